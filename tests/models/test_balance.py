"""Balance without a loss: offsets that move by the sign of a step's loads, whoever counts them."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from resilin.models.balance import TINY, excess
from resilin.models.decoder import Decoder
from resilin.models.decoder_settings import DecoderSettings, MoESettings
from resilin.models.huggingface import load_pretrained, save_pretrained
from resilin.models.huggingface_families import family_of
from resilin.models.moe import affinities, route
from resilin.models.weight_files import ModelFolderError
from resilin.nested.expert_loads import expert_loads, stacked
from resilin.nouns import Batch
from resilin.objective.next_token import NextToken
from resilin.optim.adamw import AdamW
from resilin.optim.clip import global_norm
from resilin.optim.muon import Muon
from resilin.optim.sgd import SGD
from resilin.optim.sign import SignPart

EXPERTS, CHOICES, RATE = 6, 2, 0.25
ROUTINGS = ("softmax_topk", "topk_softmax", "sigmoid_topk")


def moe(**more) -> MoESettings:
    told = {"experts": EXPERTS, "experts_per_token": CHOICES, "expert_size": 8, "balance": "bias", "balance_rate": RATE}
    return MoESettings(**(told | more))


def settings(mixture: MoESettings, **more) -> DecoderSettings:
    return DecoderSettings(vocab_size=40, hidden_size=16, layers=2, heads=2, moe=mixture, init_std=0.4, **more)


def batch(rows: int = 6) -> Batch:
    tokens = torch.randint(0, 40, (rows, 13), generator=torch.Generator().manual_seed(3))
    return Batch(torch.arange(rows), {"tokens": tokens[:, :-1], "labels": tokens[:, 1:]})


LOSS = NextToken(load_balance=0.0).build()


def gradients(model: Decoder, parts: int = 1) -> dict[str, torch.Tensor]:
    whole = batch()
    model.zero_grad(set_to_none=True)
    size = len(whole) // parts
    for part in range(parts):
        LOSS(model, whole.rows(part * size, (part + 1) * size), None).sum.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("routing", ROUTINGS)
@given(seed=st.integers(0, 1000), k=st.integers(1, EXPERTS), offsets=st.lists(st.floats(-2, 2), min_size=6, max_size=6))
def test_offsets_change_who_is_chosen_and_no_weight(routing, seed, k, offsets):
    logits = torch.randn(7, EXPERTS, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    weights, chosen = route(logits, moe(routing=routing), k, torch.tensor(offsets, dtype=torch.float64))
    affinity = affinities(logits, moe(routing=routing))
    expected = affinity.gather(-1, chosen)
    expected = expected.softmax(-1) if routing == "topk_softmax" else expected / expected.sum(-1, keepdim=True)
    torch.testing.assert_close(weights, expected, rtol=0, atol=0)
    torch.testing.assert_close(weights.sum(-1), torch.ones(7, dtype=torch.float64))
    preferred = affinity + torch.tensor(offsets, dtype=torch.float64)
    worst_chosen = preferred.gather(-1, chosen).min(-1).values
    left = preferred.scatter(-1, chosen, -torch.inf).max(-1).values
    assert bool((worst_chosen >= left).all())


@pytest.mark.parametrize("routing", ROUTINGS)
def test_no_offsets_is_offsets_of_zero(routing):
    logits = torch.randn(50, EXPERTS, generator=torch.Generator().manual_seed(0))
    plain, zero = route(logits, moe(routing=routing)), route(logits, moe(routing=routing), None, torch.zeros(EXPERTS))
    assert all(torch.equal(one, other) for one, other in zip(plain, zero, strict=True))


@pytest.mark.parametrize("routing", ROUTINGS)
def test_fewer_choices_are_the_first_of_more(routing):
    logits = torch.randn(50, EXPERTS, generator=torch.Generator().manual_seed(0))
    offsets = torch.randn(EXPERTS, generator=torch.Generator().manual_seed(1))
    _, all_of_them = route(logits, moe(routing=routing), EXPERTS, offsets)
    for k in range(1, EXPERTS):
        assert torch.equal(route(logits, moe(routing=routing), k, offsets)[1], all_of_them[:, :k])


@given(seed=st.integers(0, 1000), tokens=st.integers(1, 40), parts=st.integers(1, 5))
def test_excess_of_parts_adds_up_to_that_of_all(seed, tokens, parts):
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.rand(tokens, EXPERTS, generator=generator).topk(CHOICES).indices
    counts = torch.bincount(chosen.flatten(), minlength=EXPERTS)
    assert excess(chosen, EXPERTS).tolist() == (counts * EXPERTS - counts.sum()).tolist()
    added = sum(excess(part, EXPERTS) for part in chosen.tensor_split(parts))
    assert torch.equal(torch.as_tensor(added), excess(chosen, EXPERTS))


@pytest.mark.parametrize("how", ["plain", "recomputed", "tiled", "parts"])
def test_the_gradient_of_offsets_is_the_excess_of_loads(how):
    more = {"recomputed": {"recompute": "block"}, "tiled": {"mlp_tiles": 3}}.get(how, {})
    model = Decoder(settings(moe(), **more))
    found = gradients(model, 3 if how == "parts" else 1)
    loads = stacked(expert_loads(model, [batch()])).float()
    for layer, counts in enumerate(loads):
        expected = TINY * (counts * EXPERTS - counts.sum())
        assert torch.equal(found[f"blocks.{layer}.moe.balance_bias"], expected)
        assert bool(expected.any())


def test_offsets_leave_the_other_gradients_and_the_common_norm_as_they_are():
    plain, balanced = Decoder(settings(moe(balance="none"))), Decoder(settings(moe()))
    theirs, mine = gradients(plain), gradients(balanced)
    rest = {name: grad for name, grad in mine.items() if not name.endswith("balance_bias")}
    assert rest.keys() == theirs.keys()
    assert all(torch.equal(grad, theirs[name]) for name, grad in rest.items())
    assert float(global_norm(list(mine.values()))) == float(global_norm(list(theirs.values())))


@pytest.mark.parametrize("optimizer", [AdamW(), SGD(), Muon()], ids=["adamw", "sgd", "muon"])
def test_a_step_moves_offsets_by_the_sign_of_the_load_alone(optimizer):
    model = Decoder(settings(moe()))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    loads = stacked(expert_loads(model, [batch()])).double()
    built = optimizer.build(model, 10)
    gradients(model)
    built.step(0)
    for layer, counts in enumerate(loads):
        name = f"blocks.{layer}.moe.balance_bias"
        expected = before[name] + RATE * torch.sign(counts.mean() - counts).float()
        assert torch.equal(dict(model.named_parameters())[name], expected)
    (part,) = [one for one in built.parts if isinstance(one, SignPart)]
    others = [m.name for one in built.parts if one is not part for m in one.members()]
    assert sorted([*others, *(m.name for m in part.members())]) == sorted(before)
    assert all(not m.moments for m in part.members())


def test_offsets_even_out_the_load():
    """With a router that prefers one expert by far."""
    model = Decoder(settings(moe(balance_rate=0.02)))
    with torch.no_grad():
        for block in model.blocks:
            block.moe.router.weight[0] = 0.5
    built = SGD(lr=1e-9).build(model, 100)
    first = stacked(expert_loads(model, [batch()])).double()
    for step in range(100):
        gradients(model)
        built.step(step)
    last = stacked(expert_loads(model, [batch()])).double()
    assert float(last.std(1).max()) < 0.5 * float(first.std(1).min())


def test_a_frozen_model_keeps_its_offsets():
    model = Decoder(settings(moe()))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name == "head.weight")
    assert set(gradients(model)) == {"head.weight"}
    assert not [part for part in AdamW().build(model, 1).parts if isinstance(part, SignPart)]


@pytest.mark.parametrize(
    ("routing", "family"), [("softmax_topk", "resilin"), ("sigmoid_topk", "glm4_moe")], ids=["ours", "stock"]
)
def test_a_folder_keeps_them(routing, family, tmp_path):
    model = Decoder(settings(moe(routing=routing)))
    with torch.no_grad():
        for block in model.blocks:
            block.moe.balance_bias.normal_()
    save_pretrained(model, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == family
    again = load_pretrained(tmp_path)
    if family == "resilin":
        assert again.settings == model.settings
    else:  # a stock config tells what is computed, not how it was trained
        rate = {"balance_rate": again.settings.moe.balance_rate}
        assert again.settings.moe == model.settings.moe.model_copy(update=rate)
    tokens = batch()["tokens"]
    assert torch.equal(again(tokens).hidden_BTD, model(tokens).hidden_BTD)


def test_what_no_family_has_is_not_said_to_be_one():
    for told in (moe(), moe(balance="none", routing="sigmoid_topk")):
        with pytest.raises(ModelFolderError, match=r"balance|routing"):
            family_of(settings(told))
