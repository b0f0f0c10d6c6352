"""Megatron's folders in its `torch` format, written here rank by rank from a whole model, with its names and keys.

Megatron-LM itself does not run on this machine; what each rank has follows its documented layout: a fused projection
holds [queries, key, value] of one group of heads after the other, a gated MLP [gate, up], layers and experts are
numbered anew in each file, and the last stage has a copy of the tied embedding.
"""

from __future__ import annotations

import io
import random
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from resilin.checkpoint.errors import CheckpointError, DamagedError
from resilin.checkpoint.foreign.convert import Options, convert, open_stored
from resilin.checkpoint.foreign.formats import WriteOptions

HIDDEN, INNER, HEADS, GROUPS, WIDTH, LAYERS, EXPERTS, VOCABULARY, DIVISIBLE_BY = 12, 8, 8, 4, 3, 4, 4, 37, 4
ONE_RANKS = ["optimizer", "rng_state", "model/*_extra_state"]
QKV = (HEADS + 2 * GROUPS) * WIDTH


def whole_model(tied: bool = True, experts: bool = False) -> dict[str, Tensor]:
    torch.manual_seed(0)
    shapes: dict[str, tuple[int, ...]] = {"embedding.word_embeddings.weight": (VOCABULARY, HIDDEN)}
    for layer in range(LAYERS):
        at = f"decoder.layers.{layer}."
        shapes |= {
            at + "self_attention.linear_qkv.layer_norm_weight": (HIDDEN,),
            at + "self_attention.linear_qkv.weight": (QKV, HIDDEN),
            at + "self_attention.linear_qkv.bias": (QKV,),
            at + "self_attention.linear_proj.weight": (HIDDEN, HEADS * WIDTH),
            at + "self_attention.linear_proj.bias": (HIDDEN,),
        }
        if experts:
            shapes |= {at + "pre_mlp_layernorm.weight": (HIDDEN,), at + "mlp.router.weight": (EXPERTS, HIDDEN)}
            for expert in range(EXPERTS):
                inner = f"{at}mlp.experts.local_experts.{expert}."
                shapes |= {
                    inner + "linear_fc1.weight": (2 * INNER, HIDDEN),
                    inner + "linear_fc2.weight": (HIDDEN, INNER),
                }
        else:
            shapes |= {
                at + "mlp.linear_fc1.layer_norm_weight": (HIDDEN,),
                at + "mlp.linear_fc1.weight": (2 * INNER, HIDDEN),
                at + "mlp.linear_fc2.weight": (HIDDEN, INNER),
            }
    shapes["decoder.final_layernorm.weight"] = (HIDDEN,)
    if not tied:
        shapes["output_layer.weight"] = (VOCABULARY, HIDDEN)
    return {name: torch.randn(shape).bfloat16() for name, shape in shapes.items()}


def _padded(ranks: int) -> int:
    return -(-VOCABULARY // (DIVISIBLE_BY * ranks)) * DIVISIBLE_BY * ranks


def _cut(name: str, value: Tensor, tp: int, ranks: int) -> Tensor:
    if "word_embeddings" in name or "output_layer" in name:
        padded = torch.full((_padded(ranks), HIDDEN), torch.nan, dtype=value.dtype)
        padded[:VOCABULARY] = value
        return padded.chunk(ranks)[tp].clone()
    if "linear_qkv." in name and "norm" not in name:
        return value.view(GROUPS, -1, *value.shape[1:]).chunk(ranks)[tp].reshape(-1, *value.shape[1:]).clone()
    if "linear_fc1.weight" in name:
        gate, up = value.chunk(2)
        return torch.cat([gate.chunk(ranks)[tp], up.chunk(ranks)[tp]])
    if name.endswith(("linear_proj.weight", "linear_fc2.weight")):
        return value.chunk(ranks, dim=1)[tp].clone()
    return value.clone()


def write(folder: Path, model: dict[str, Tensor], tp: int, pp: int, ep: int = 1, chunks: int = 1) -> Path:
    untied, experts = "output_layer.weight" in model, any("experts" in name for name in model)
    args = Namespace(
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        expert_model_parallel_size=ep,
        num_layers=LAYERS,
        num_query_groups=GROUPS,
        group_query_attention=True,
        swiglu=True,
        vocab_size=VOCABULARY,
        padded_vocab_size=_padded(tp),
        make_vocab_size_divisible_by=DIVISIBLE_BY,
        untie_embeddings_and_output_weights=untied,
        num_experts=EXPERTS if experts else None,
        params_dtype=torch.bfloat16,
    )
    each = LAYERS // (pp * chunks)
    for p in range(pp):
        for t in range(tp):
            for e in range(ep):
                content = {"args": args, "checkpoint_version": 3.0, "iteration": 100, "tokens": 7}
                for c in range(chunks):
                    first = (c * pp + p) * each
                    part: dict[str, object] = {}
                    for name, value in model.items():
                        local = _local(name, first, each, p, pp, c, chunks, e, EXPERTS // ep)
                        if local is not None:
                            part[local] = _cut(name, value, t, tp)
                    if not untied and p == pp - 1 and pp > 1 and c == chunks - 1:
                        name = "embedding.word_embeddings.weight"
                        part["output_layer.weight"] = _cut(name, model[name], t, tp)
                    part["decoder.layers.0.self_attention.linear_qkv._extra_state"] = io.BytesIO(b"scales")
                    part["output_layer._extra_state"] = None
                    content["model" if chunks == 1 else f"model{c}"] = part
                states = random.getstate(), np.random.get_state()
                content["rng_state"] = [{"random_rng_state": states[0], "np_rng_state": states[1]}]
                content["optimizer"] = {"optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}}}
                name = f"mp_rank_{t:02d}" + (f"_{p:03d}" if pp > 1 else "") + (f"_{e:03d}" if ep > 1 else "")
                path = folder / "iter_0000100" / name / "model_optim_rng.pt"
                path.parent.mkdir(parents=True)
                torch.save(content, path)
    (folder / "latest_checkpointed_iteration.txt").write_text("100")
    return folder


def _local(
    name: str, first: int, each: int, p: int, pp: int, c: int, chunks: int, expert_rank: int, local_experts: int
) -> str | None:
    parts = name.split(".")
    if "layers" in parts:
        at = parts.index("layers") + 1
        if not first <= int(parts[at]) < first + each:
            return None
        parts[at] = str(int(parts[at]) - first)
        if "local_experts" in parts:
            at = parts.index("local_experts") + 1
            if int(parts[at]) // local_experts != expert_rank:
                return None
            parts[at] = str(int(parts[at]) % local_experts)
        return ".".join(parts)
    last = name.startswith(("decoder.final", "output_layer"))
    here = (p == pp - 1 and c == chunks - 1) if last else (p == 0 and c == 0)
    return name if here else None


def _same(stored, model: dict[str, Tensor]) -> None:
    assert {name.removeprefix("model/") for name in stored.under("model/")} == set(model)
    for name, value in model.items():
        assert torch.equal(stored.tensor(f"model/{name}"), value), name


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    ("tp", "pp", "chunks"), [(1, 1, 1), (2, 1, 1), (4, 1, 1), (1, 2, 1), (2, 2, 1), (2, 2, 2), (4, 4, 1), (1, 2, 2)]
)
def test_every_cut_gives_the_model(tmp_path, tied, tp, pp, chunks):
    model = whole_model(tied)
    stored = open_stored(write(tmp_path / "megatron", model, tp, pp, chunks=chunks))
    _same(stored, model)
    assert stored.step == 100


@pytest.mark.parametrize(("tp", "pp", "ep"), [(1, 1, 2), (2, 1, 4), (2, 2, 2), (1, 4, 4)])
def test_experts_are_numbered_as_in_the_whole_model(tmp_path, tp, pp, ep):
    model = whole_model(experts=True)
    _same(open_stored(write(tmp_path / "megatron", model, tp, pp, ep)), model)


@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 1), (4, 2), (1, 4)])
@pytest.mark.parametrize("tied", [True, False])
def test_what_is_written_is_what_the_ranks_would_have(tmp_path, tied, tp, pp):
    model = whole_model(tied)
    convert(write(tmp_path / "megatron", model, 2, 2), tmp_path / "resilin", Options(leave_out=ONE_RANKS))
    options = Options(target_format="megatron", write=WriteOptions(tp, pp))
    convert(tmp_path / "resilin", tmp_path / "again", options)
    _same(open_stored(tmp_path / "again"), model)
    write(tmp_path / "expected", model, tp, pp)
    files = sorted((tmp_path / "expected").rglob("model_optim_rng.pt"))
    assert len(files) == len(list((tmp_path / "again").rglob("model_optim_rng.pt"))) == tp * pp
    for path in files:
        ours = torch.load(tmp_path / "again" / path.relative_to(tmp_path / "expected"), weights_only=False)
        theirs = torch.load(path, weights_only=False)
        assert ours["iteration"] == 100
        assert ours["args"].tensor_model_parallel_size == tp
        tensors = {name: value for name, value in theirs["model"].items() if isinstance(value, Tensor)}
        assert set(ours["model"]) == set(tensors)
        for name, value in tensors.items():
            padding = value.isnan()
            assert torch.equal(ours["model"][name][~padding], value[~padding]), name
            assert (ours["model"][name][padding] == 0).all()
        assert ours["args"].padded_vocab_size == _padded(tp)


def test_optimizer_and_random_states_are_refused_by_name(tmp_path):
    folder = write(tmp_path / "megatron", whole_model(), 1, 1)
    with pytest.raises(CheckpointError, match=r"_extra_state \(and 2 more\) cannot be converted: .*FP8 scales"):
        convert(folder, tmp_path / "out")
    some = Options(leave_out=["model/*_extra_state"])
    with pytest.raises(CheckpointError, match=r"optimizer \(and 1 more\) cannot be converted: its states lie by"):
        convert(folder, tmp_path / "out", some)
    convert(folder, tmp_path / "out", Options(leave_out=ONE_RANKS))
    stored = open_stored(tmp_path / "out")
    assert stored.other["megatron"]["args"]["params_dtype"] == "torch.bfloat16"
    assert stored.other["megatron"]["tokens"] == 7


def test_a_missing_rank_is_named(tmp_path):
    folder = write(tmp_path / "megatron", whole_model(), 2, 2)
    path = folder / "iter_0000100" / "mp_rank_01_001"
    (path / "model_optim_rng.pt").unlink()
    with pytest.raises(DamagedError, match=r"mp_rank_01_001/model_optim_rng.pt: the file is missing"):
        open_stored(folder)
    path.rmdir()
    with pytest.raises(DamagedError, match="tensor rank 1, pipeline rank 1, expert rank 0 is missing"):
        open_stored(folder)


def test_copies_of_the_tied_embedding_that_differ_are_refused(tmp_path):
    folder = write(tmp_path / "megatron", whole_model(), 1, 2)
    path = folder / "iter_0000100" / "mp_rank_00_001" / "model_optim_rng.pt"
    content = torch.load(path, weights_only=False)
    content["model"]["output_layer.weight"][0, 0] += 1
    torch.save(content, path)
    with pytest.raises(CheckpointError, match=r"mp_rank_00_00\d/.*: holds other values of 'model/embedding"):
        convert(folder, tmp_path / "out", Options(leave_out=ONE_RANKS))


def test_a_parameter_without_a_rule_is_refused_by_name(tmp_path):
    model = whole_model()
    model["decoder.layers.0.novel.weight"] = torch.ones(4, HIDDEN).bfloat16()
    folder = write(tmp_path / "megatron", model, 2, 1)
    with pytest.raises(CheckpointError, match=r"no rule says how .* of 'decoder.layers.0.novel.weight' make it up"):
        open_stored(folder)


def test_a_tracker_that_leads_elsewhere_is_refused(tmp_path):
    folder = write(tmp_path / "megatron", whole_model(), 1, 1)
    (folder / "latest_checkpointed_iteration.txt").write_text("../elsewhere")
    with pytest.raises(DamagedError, match="should hold an iteration's number or 'release'"):
        open_stored(folder)
