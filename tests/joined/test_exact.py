"""What holds to the bit, or to rounding, of experts trained apart and joined (FlexOlmo's exact properties)."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from joined_cases import (
    IN_MEMORY,
    KINDS,
    anchor_model,
    logits,
    rows_of,
    tokens,
    train,
    trained_expert,
    weights,
    written_anchor,
)

from resilin.joined import JoinedRecord, beside_anchor, expert_of, join, join_models, make_anchor, without
from resilin.joined.anchor import Anchor
from resilin.joined.beside import BesideAnchor
from resilin.joined.stored import StoredModel
from resilin.joined.training import router_only
from resilin.joined.verify import verify
from resilin.models.huggingface import load_pretrained
from resilin.models.plain import make_plain
from resilin.nested import Budget, budget, extract, extract_folder


@pytest.fixture(scope="module", params=KINDS)
def place(request, tmp_path_factory):
    """An anchor's folder, and three experts that were trained beside it."""
    folder = tmp_path_factory.mktemp("joined")
    anchor = written_anchor(folder / "anchor", request.param)
    experts = [trained_expert(name, n, request.param) for n, name in enumerate(("news", "code", "maths"), 1)]
    experts[1] = trained_expert("code", 2, request.param, offset=None)
    join(anchor.folder, experts, folder / "joined", top_k=2)
    return folder, request.param, experts


@given(
    kind=st.sampled_from(sorted(IN_MEMORY)),
    number=st.integers(1, 50),
    scale=st.sampled_from([0.0, 0.5, 30.0]),
    offset=st.sampled_from([None, -0.1, -20.0]),
)
@settings(max_examples=15, deadline=None)
def test_a_new_expert_changes_nothing_whatever_the_router(kind, number, scale, offset):
    dense = logits(anchor_model(kind), tokens(number))
    model = beside_anchor(anchor_model(kind), rows_of(0, scale), rows_of(number, scale), offset)
    torch.testing.assert_close(logits(model, tokens(number)), dense, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", IN_MEMORY)
def test_nothing_but_the_expert_is_trained(kind):
    model = beside_anchor(anchor_model(kind), rows_of(0), rows_of(1))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    train(model, 1)
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {name for name, p in model.named_parameters() if p.requires_grad}
    assert {name.split(".")[3] for name in changed} == {"own", "row", "raw"}
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
    assert all(bool((block.moe.offsets() <= 0).all()) for block in model.blocks)


def test_the_anchor_inside_a_trained_model_has_its_digest(place):
    folder, kind, experts = place
    assert {expert.anchor for expert in experts} == {Anchor.read(folder / "anchor").digest}
    model = beside_anchor(anchor_model(kind), rows_of(0), rows_of(1))
    with torch.no_grad():
        model.blocks[1].attention.v.weight[0, 0] += 1e-3
    assert expert_of(model, "news").anchor != experts[0].anchor


@pytest.mark.parametrize("kind", IN_MEMORY)
def test_a_model_in_training_is_the_model_joined_of_one_expert(kind):
    model = train(beside_anchor(anchor_model(kind), rows_of(0), rows_of(1)), 1)
    expert = expert_of(model, "news")
    joined = join_models(anchor_model(kind), rows_of(0), [expert])
    torch.testing.assert_close(logits(joined, tokens()), logits(model, tokens()), atol=1e-5, rtol=1e-5)
    plain = make_plain(model)
    assert plain.settings == joined.settings
    mine, others = dict(plain.named_parameters()), dict(joined.named_parameters())
    assert mine.keys() == others.keys()
    assert all(torch.equal(mine[name], others[name]) for name in mine)


def test_without_all_experts_it_is_the_anchor_to_the_bit(place):
    folder, kind, experts = place
    without(folder / "joined", [one.name for one in experts], folder / "none")
    assert weights(folder / "none")["model.safetensors"] == weights(folder / "anchor")["model.safetensors"]
    dense, model = anchor_model(kind), load_pretrained(folder / "joined")
    assert torch.equal(logits(load_pretrained(folder / "none"), tokens()), logits(dense, tokens()))
    with budget(model, JoinedRecord.read(folder / "joined").budget(model.settings, ["news", "code", "maths"])):
        alone = logits(model, tokens())
    torch.testing.assert_close(alone, logits(dense, tokens()), atol=1e-6, rtol=1e-5)
    strangers = [replace(one, tensors={n: 1e3 * t for n, t in one.tensors.items()}) for one in experts]
    other = join_models(dense, rows_of(0), strangers)
    with budget(other, Budget(experts=((0,),) * 2)):
        assert torch.equal(logits(other, tokens()), alone)


@pytest.mark.parametrize("gone", [["news"], ["maths"], ["code", "news"]])
def test_taking_out_is_never_having_joined(place, gone):
    folder, kind, experts = place
    rest = [one for one in experts if one.name not in gone]
    out, never = folder / f"without-{'-'.join(gone)}", folder / f"never-{'-'.join(gone)}"
    without(folder / "joined", gone, out)
    join(folder / "anchor", rest, never, top_k=2)
    assert {f.name: f.read_bytes() for f in out.iterdir()} == {f.name: f.read_bytes() for f in never.iterdir()}

    whole, wanted = load_pretrained(folder / "joined"), None
    wanted = JoinedRecord.read(folder / "joined").budget(whole.settings, gone)
    expected = logits(load_pretrained(never), tokens())
    with budget(whole, wanted):
        assert torch.equal(logits(whole, tokens()), expected)
    assert torch.equal(logits(extract(whole, wanted), tokens()), expected)
    assert torch.equal(logits(extract_folder(folder / "joined", wanted), tokens()), expected)
    in_memory = join_models(anchor_model(kind), rows_of(0), rest, top_k=2)
    assert torch.equal(logits(in_memory, tokens()), expected)


def test_nothing_of_an_expert_is_left_in_the_folder(place):
    folder, _, experts = place
    without(folder / "joined", ["news"], folder / "clean")
    there = b"".join(file.read_bytes() for file in (folder / "joined").iterdir())
    left = b"".join(file.read_bytes() for file in (folder / "clean").iterdir())
    for name, tensor in experts[0].tensors.items():
        raw = tensor.contiguous().numpy().tobytes()
        assert raw in there, name
        assert raw not in left, name
    assert b"news" in there
    assert b"news" not in left


def test_taking_out_reads_no_matrix_of_what_goes(place, monkeypatch):
    folder, _, _ = place
    read = []
    whole = StoredModel.feed_forward

    def watched(self, layer, matrix, expert):
        read.append((layer, expert))
        return whole(self, layer, matrix, expert)

    monkeypatch.setattr(StoredModel, "feed_forward", watched)
    without(folder / "joined", ["code"], folder / "watched")
    assert set(read) == {(layer, expert) for layer in range(2) for expert in (0, 1, 3)}
    assert len(read) == len(set(read)) * 3  # gate, up and down, each once


def test_the_order_of_joining_changes_rounding_only(place):
    folder, _, experts = place
    join(folder / "anchor", experts[::-1], folder / "turned")
    join(folder / "anchor", experts, folder / "straight")
    one, other = (logits(load_pretrained(folder / name), tokens()) for name in ("turned", "straight"))
    torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


def test_joining_one_after_another_is_joining_at_once(place):
    folder, _, experts = place
    join(folder / "anchor", experts[:1], folder / "first")
    join(folder / "first", experts[1:], folder / "second", top_k=2)
    assert weights(folder / "second") == weights(folder / "joined")
    assert JoinedRecord.read(folder / "second") == JoinedRecord.read(folder / "joined")


def test_weights_in_many_files_are_the_same_weights(place):
    folder, _, experts = place
    join(folder / "anchor", experts, folder / "many", top_k=2, max_shard_bytes=4000)
    assert len(list((folder / "many").glob("*.safetensors"))) > 3
    one, many = load_pretrained(folder / "joined"), load_pretrained(folder / "many")
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), many.parameters(), strict=True))
    without(folder / "many", ["code"], folder / "fewer", max_shard_bytes=4000)
    without(folder / "joined", ["code"], folder / "few")
    one, many = load_pretrained(folder / "few"), load_pretrained(folder / "fewer")
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), many.parameters(), strict=True))


@given(offset=st.floats(0, 100))
@settings(max_examples=10, deadline=None)
def test_an_offset_above_0_counts_as_none(offset):
    expert = trained_expert("news", 1)
    raised = {n: torch.tensor(offset) if n.endswith("offset") else t for n, t in expert.tensors.items()}
    none = {n: torch.zeros(()) if n.endswith("offset") else t for n, t in expert.tensors.items()}
    one, other = (
        join_models(anchor_model(), rows_of(0), [replace(expert, tensors=tensors)]) for tensors in (raised, none)
    )
    assert torch.equal(logits(one, tokens()), logits(other, tokens()))


def test_tuning_changes_the_rows_of_the_router_only(place):
    folder, _, _ = place
    model = router_only(load_pretrained(folder / "joined"))
    assert model.settings.moe.experts_per_token == 4
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    train(model, 7)
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {f"blocks.{layer}.moe.router.weight" for layer in range(2)}


def test_an_offset_gets_a_gradient_wherever_it_stands():
    model = beside_anchor(anchor_model(), rows_of(0), rows_of(1), -1e-3)
    train(model, 1, steps=1)
    for block in model.blocks:
        assert isinstance(block.moe, BesideAnchor)
        assert block.moe.raw.grad is not None
        assert float(block.moe.raw.grad.abs()) > 0


@pytest.mark.parametrize(("kind", "architecture"), [("norms after", "FlexOlmo"), ("norms before", "Mixtral")])
def test_without_offsets_transformers_opens_what_was_joined(tmp_path, kind, architecture):
    transformers = pytest.importorskip("transformers")
    written_anchor(tmp_path / "anchor", kind)
    experts = [trained_expert(name, n, kind, offset=None) for n, name in enumerate(("news", "code"), 1)]
    join(tmp_path / "anchor", experts, tmp_path / "joined", top_k=2)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "joined").eval()
    assert type(theirs).__name__ == f"{architecture}ForCausalLM"
    with torch.no_grad():
        expected = theirs(tokens()).logits
    torch.testing.assert_close(logits(load_pretrained(tmp_path / "joined"), tokens()), expected, atol=1e-5, rtol=1e-5)


def test_an_anchor_in_half_the_bytes_is_trained_beside_in_float32_and_joined_as_it_is_stored(tmp_path):
    anchor = make_anchor(anchor_model(), None, rows_of(0), tmp_path / "anchor", dtype=torch.bfloat16)
    model = beside_anchor(load_pretrained(tmp_path / "anchor"), anchor.rows_LD, rows_of(1))
    expert = expert_of(train(model, 1), "news")
    assert expert.anchor == anchor.digest
    join(tmp_path / "anchor", [expert, trained_expert_beside(tmp_path / "anchor", "code", 2)], tmp_path / "joined")
    assert all(one.holds for one in verify(tmp_path / "joined", [expert]))
    without(tmp_path / "joined", ["code"], tmp_path / "less")
    join(tmp_path / "anchor", [expert], tmp_path / "never")
    assert weights(tmp_path / "less") == weights(tmp_path / "never")
    without(tmp_path / "joined", ["code", "news"], tmp_path / "none")
    assert weights(tmp_path / "none")["model.safetensors"] == weights(tmp_path / "anchor")["model.safetensors"]


def trained_expert_beside(folder, name, number):
    model = beside_anchor(load_pretrained(folder), Anchor.read(folder).rows_LD, rows_of(number))
    return expert_of(train(model, number), name)
