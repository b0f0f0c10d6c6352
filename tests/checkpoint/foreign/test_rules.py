"""Shards of tensor, pipeline and data parallelism, cut from known tensors and put together again.

The folders have DeepSpeed's layout and names; what each rank holds is computed here the other way, from the whole.
"""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from resilin.checkpoint.errors import CheckpointError
from resilin.checkpoint.foreign.convert import Options, convert, open_stored
from resilin.checkpoint.foreign.formats import ReadOptions
from resilin.checkpoint.foreign.rules import Rules

HEADS, GROUPS, WIDTH, HIDDEN, INNER, VOCABULARY = 8, 4, 2, 5, 12, 37
QKV = [HEADS * WIDTH, GROUPS * WIDTH, GROUPS * WIDTH]
TABLE = {
    "universal_checkpoint_version": 0.4,
    "original_vocab_size": VOCABULARY,
    "vocabulary_parameter_patterns": [r"embed\.weight"],
    "tp_replicated_parameter_patterns": [r".*norm\.weight"],
    "parameter_to_average_patterns": [r".*drift\.weight"],
    "parameter_with_row_parallelism_patterns": [r".*(out|down)\.weight"],
    "parameter_with_2_sub_params_cat_dim_0": [r".*gate_up\.weight"],
    "parameter_with_sub_params": [{"patterns": [r".*qkv\.weight"], "shape": [QKV, -1], "partition_dim": 0}],
    "pipeline_replicated_parameter_patterns": [r"embed\.weight"],
}


def whole_tensors(stages: int) -> dict[str, Tensor]:
    torch.manual_seed(0)
    shapes = {"embed.weight": (VOCABULARY, HIDDEN)}
    for layer in range(stages):
        shapes |= {
            f"{layer}.qkv.weight": (sum(QKV), HIDDEN),
            f"{layer}.out.weight": (HIDDEN, HEADS * WIDTH),
            f"{layer}.norm.weight": (HIDDEN,),
            f"{layer}.drift.weight": (HIDDEN,),
            f"{layer}.gate_up.weight": (2 * INNER, HIDDEN),
            f"{layer}.down.weight": (HIDDEN, INNER),
            f"{layer}.up.bias": (INNER,),
        }
    return {name: torch.randn(shape) for name, shape in shapes.items()}


def _cut(name: str, value: Tensor, tp: int, ranks: int, pad: float) -> Tensor:
    if ranks == 1 and value.numel() == 1:
        return value
    if name == "embed.weight":
        rows = -(-VOCABULARY // ranks)
        padded = torch.full((rows * ranks, HIDDEN), pad)
        padded[:VOCABULARY] = value
        return padded[tp * rows : (tp + 1) * rows]
    if "qkv" in name:
        return torch.cat([part.chunk(ranks)[tp] for part in value.split(QKV)])
    if "gate_up" in name:
        return torch.cat([half.chunk(ranks)[tp] for half in value.chunk(2)])
    if "out" in name or "down" in name:
        return value.chunk(ranks, dim=1)[tp]
    if "norm" in name:
        return value
    if "drift" in name:  # copies that rounding has driven apart; their mean is the value
        return value + (tp - (ranks - 1) / 2) * 0.25
    return value.chunk(ranks)[tp]


def write_zero(
    folder: Path, tensors: dict[str, Tensor], tp: int, pp: int, dp: int, stage: int, table: dict | None = TABLE
) -> Path:
    """A DeepSpeed folder of these tensors, padding filled with NaN; moments are the tensors times 2 and 3."""
    folder.mkdir(parents=True)
    for stage_number in range(pp):
        for rank in range(tp):
            mp = stage_number * tp + rank
            mine = {
                name: _cut(name, value, rank, tp, torch.nan)
                for name, value in tensors.items()
                if (name == "embed.weight" and stage_number in (0, pp - 1)) or name.startswith(f"{stage_number}.")
            }
            groups = [
                {n: t for n, t in mine.items() if t.dim() > 1},
                {n: t for n, t in mine.items() if t.dim() == 1},
            ]
            (_write_3 if stage == 3 else _write_1)(folder, groups, mp, tp, pp, dp, table)
    return folder


def _model(groups, tp: int, pp: int, table) -> dict:
    return {
        "module": OrderedDict(),
        "buffer_names": [],
        "param_shapes": [OrderedDict((n, t.shape) for n, t in group.items()) for group in groups],
        "shared_params": {},
        "global_steps": 5,
        "checkpoint_parallel_dimensions": {"pp_degree": pp, "tp_degree": tp},
        **({"universal_checkpoint_info": table} if table is not None else {}),
    }


class fragment_address:  # noqa: N801  # as DeepSpeed calls it, in whose name it is pickled
    def __init__(self, numel: int, start: int) -> None:
        self.numel, self.start = numel, start


fragment_address.__module__ = "deepspeed.utils.tensor_fragment"


def _save(content: dict, path: Path) -> None:
    deepspeed = pytest.importorskip("deepspeed.utils.tensor_fragment")
    original = deepspeed.fragment_address
    deepspeed.fragment_address = fragment_address
    try:
        torch.save(content, path)
    finally:
        deepspeed.fragment_address = original


def _write_1(folder, groups, mp, tp, pp, dp, table) -> None:
    torch.save(_model(groups, tp, pp, table), folder / f"mp_rank_{mp:02d}_model_states.pt")
    for rank in range(dp):
        mappings, masters, states = [], [], {}
        for number, group in enumerate(groups):
            flat = torch.cat([t.reshape(-1) for t in group.values()])
            align = 2 * dp
            padded = torch.cat([flat, torch.full((-len(flat) % align,), torch.nan)])
            size = len(padded) // dp
            low, at, mapping = rank * size, 0, OrderedDict()
            for name, tensor in group.items():
                first, last = max(at, low), min(at + tensor.numel(), low + size)
                if first < last:
                    mapping[name] = fragment_address(last - first, first - low)
                at += tensor.numel()
            mine = padded[low : low + size].clone()
            mappings.append(mapping)
            masters.append(mine)
            states[number] = {"step": torch.tensor(5.0), "exp_avg": mine * 2, "exp_avg_sq": mine * 3}
        content = {
            "base_optimizer_state": {"state": states, "param_groups": [{"lr": 0.1}, {"lr": 0.2}]},
            "single_partition_of_fp32_groups": masters,
            "param_slice_mappings": mappings,
            "partition_count": [dp, dp],
            "group_paddings": [0, 0],
            "zero_stage": 1,
        }
        _save({"optimizer_state_dict": content}, folder / f"zero_pp_rank_{rank}_mp_rank_{mp:02d}_optim_states.pt")


def _write_3(folder, groups, mp, tp, pp, dp, table) -> None:
    sub_groups = [dict([item]) for item in list(groups[0].items())[:1]]  # the first group has several
    sub_groups += [dict(list(groups[0].items())[1:]), groups[1]]
    for rank in range(dp):
        torch.save(_model(sub_groups, tp, pp, table), folder / f"zero_pp_rank_{rank}_mp_rank_{mp:02d}_model_states.pt")
        masters, states = [], {}
        for number, group in enumerate(sub_groups):
            slots = []
            for tensor in group.values():
                slot = -(-tensor.numel() // dp)
                padded = torch.cat([tensor.reshape(-1), torch.full((slot * dp - tensor.numel(),), torch.nan)])
                slots.append(padded[rank * slot : (rank + 1) * slot])
            mine = torch.cat(slots)
            masters.append(mine)
            states[number] = {"step": torch.tensor(5.0), "exp_avg": mine * 2, "exp_avg_sq": mine * 3}
        inner = {"state": states, "param_groups": [{"lr": 0.1, "params": [0, 1]}, {"lr": 0.2, "params": [2]}]}
        content = {"optimizer_state_dict": inner, "fp32_flat_groups": masters, "partition_count": dp, "zero_stage": 3}
        path = folder / f"zero_pp_rank_{rank}_mp_rank_{mp:02d}_optim_states.pt"
        torch.save({"optimizer_state_dict": content}, path)


def _expected(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    found = {f"model/{name}": value for name, value in tensors.items()}
    found |= {f"optimizer/exp_avg/{name}": value * 2 for name, value in tensors.items()}
    return found | {f"optimizer/exp_avg_sq/{name}": value * 3 for name, value in tensors.items()}


GRID = [(tp, pp, dp, stage) for tp in (1, 2, 4) for pp in (1, 2, 3) for dp in (1, 2, 3, 5) for stage in (1, 3)]
QUICK = {(1, 1, 1, 1), (2, 1, 3, 1), (4, 2, 2, 1), (2, 3, 5, 1), (2, 1, 3, 3), (4, 2, 2, 3), (1, 1, 5, 3), (4, 1, 1, 3)}


@pytest.mark.parametrize(
    ("tp", "pp", "dp", "stage"),
    [pytest.param(*case, marks=() if case in QUICK else pytest.mark.slow) for case in GRID],
)
def test_every_cut_gives_the_same_tensors_and_no_padding(tmp_path, canonical_bytes, tp, pp, dp, stage):
    tensors = whole_tensors(stages=pp)
    table = TABLE if pp > 1 else {k: v for k, v in TABLE.items() if not k.startswith("pipeline")}
    stored = open_stored(write_zero(tmp_path / "shards", tensors, tp, pp, dp, stage, table))
    expected = _expected(tensors)
    assert set(expected) == {name for name in stored.names if not name.startswith("optimizer/step/")}
    for name, value in expected.items():
        found = stored.tensor(name)
        assert not found.isnan().any(), name
        close = "drift" in name  # a mean of shifted copies is rounded
        assert torch.allclose(found, value, atol=1e-6) if close else torch.equal(found, value), name
    assert [group["lr"] for group in stored.groups] == [0.1, 0.2]
    convert(tmp_path / "shards", tmp_path / "out")
    assert canonical_bytes(tmp_path / "out") == canonical_bytes(stored)


def test_one_state_has_the_same_bytes_out_of_every_cut(tmp_path, canonical_bytes):
    tensors = {name: value for name, value in whole_tensors(1).items() if "drift" not in name}
    table = {k: v for k, v in TABLE.items() if "average" not in k and "pipeline" not in k}
    cuts = [(1, 1, 1), (2, 1, 1), (4, 3, 1), (1, 2, 3), (2, 5, 3), (4, 1, 3)]
    hashes = set()
    for tp, dp, stage in cuts:
        folder = write_zero(tmp_path / f"{tp}-{dp}-{stage}", tensors, tp, 1, dp, stage, table)
        hashes.add(canonical_bytes(folder, only="model/"))
        hashes.add(canonical_bytes(folder, only="model/"))
    assert len(hashes) == 1


def test_a_fused_projection_in_rank_order_is_not_the_projection(tmp_path):
    """So the tests above can see the mistake that norms and sums cannot."""
    value = whole_tensors(1)["0.qkv.weight"]
    naive = torch.cat([_cut("0.qkv.weight", value, rank, 2, 0.0) for rank in range(2)])
    assert sorted(naive.flatten().tolist()) == sorted(value.flatten().tolist())
    assert not torch.equal(naive, value)
    plain = {k: v for k, v in TABLE.items() if "sub_params" not in k and "pipeline" not in k}
    stored = open_stored(write_zero(tmp_path / "naive", whole_tensors(1), 2, 1, 2, 1, plain))
    assert torch.equal(stored.tensor("model/0.qkv.weight"), naive)


def test_copies_that_should_be_equal_and_are_not_are_refused(tmp_path):
    table = {k: v for k, v in TABLE.items() if "average" not in k and "pipeline" not in k}
    table["tp_replicated_parameter_patterns"] = [r".*(norm|drift)\.weight"]
    folder = write_zero(tmp_path / "shards", whole_tensors(1), 2, 1, 1, 1, table)
    with pytest.raises(CheckpointError, match=r"holds other values of 'model/0.drift.weight'"):
        convert(folder, tmp_path / "out")


def test_shards_without_rules_are_refused_and_read_with_a_given_table(tmp_path):
    tensors = whole_tensors(1)
    folder = write_zero(tmp_path / "shards", tensors, 2, 1, 2, 1, None)
    with pytest.raises(CheckpointError, match=r"2 tensor-parallel ranks hold parts of 'embed.weight'.*--rules"):
        open_stored(folder)
    table = {k: v for k, v in TABLE.items() if not k.startswith("pipeline")}
    stored = open_stored(folder, None, ReadOptions(table))
    assert torch.equal(stored.tensor("model/0.qkv.weight"), tensors["0.qkv.weight"])


def test_a_rule_that_matches_nothing_is_named(tmp_path):
    table = {k: v for k, v in TABLE.items() if not k.startswith("pipeline")}
    table = {**table, "tp_replicated_parameter_patterns": [r".*norm\.weight", r".*norm\.bias"]}
    folder = write_zero(tmp_path / "shards", whole_tensors(1), 2, 1, 1, 1, table)
    with pytest.raises(CheckpointError, match=r"the pattern '.*norm\\\\.bias' matches no parameter"):
        open_stored(folder)


def test_a_tied_embedding_in_two_stages_needs_the_rule_that_says_so(tmp_path):
    table = {k: v for k, v in TABLE.items() if not k.startswith("pipeline")}
    folder = write_zero(tmp_path / "shards", whole_tensors(2), 1, 2, 1, 1, table)
    with pytest.raises(CheckpointError, match=r"'model/embed.weight' .*fragments are missing or doubled"):
        convert(folder, tmp_path / "out", Options())


@given(
    widths=st.lists(st.lists(st.integers(0, 4), min_size=3, max_size=3), min_size=1, max_size=4),
    dim=st.integers(0, 1),
)
@settings(max_examples=50)
def test_uneven_widths_and_empty_slices_keep_their_place(widths, dim):
    ranks = 3
    other = 2
    sizes = [sum(row[rank] for row in widths) for rank in range(ranks)]
    total = sum(sizes)
    shape = (total, other) if dim == 0 else (other, total)
    value = torch.arange(float(total * other)).reshape(shape)
    shards = []
    for rank in range(ranks):
        parts = value.split([sum(row) for row in widths], dim=dim)
        shards.append(
            torch.cat(
                [p.narrow(dim, sum(row[:rank]), row[rank]) for p, row in zip(parts, widths, strict=True)], dim=dim
            )
        )
    entry = {"patterns": ["a"], "shape": [-1, -1], "partition_dim": dim}
    rules = Rules({"parameter_with_sub_params": [entry], "sub_param_shard_widths": {"a": widths}}, "table")
    union = rules.union("a", [tuple(s.shape) for s in shards])
    made = torch.full(union.shape, torch.nan)
    for shard, slice_ in zip(shards, union.slices, strict=True):
        for piece in slice_.pieces:
            at = tuple(slice(o, o + s) for o, s in zip(piece.offsets, piece.local.sizes, strict=True))
            made[at] = shard[piece.local.slices]
    assert torch.equal(made, value)


def test_values_that_differ_between_ranks_are_refused_by_name(tmp_path):
    table = {k: v for k, v in TABLE.items() if not k.startswith("pipeline")}
    folder = write_zero(tmp_path / "shards", whole_tensors(1), 2, 1, 1, 1, table)
    for rank in range(2):
        path = folder / f"mp_rank_{rank:02d}_model_states.pt"
        content = torch.load(path, weights_only=False)
        torch.save({**content, "rng": torch.tensor([rank]), "seen": 3}, path)
    with pytest.raises(CheckpointError, match=r"other/rng cannot be converted: the ranks have different values"):
        convert(folder, tmp_path / "out")
    convert(folder, tmp_path / "out", Options(leave_out=["other/rng"]))
    assert open_stored(tmp_path / "out").other["seen"] == 3


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_a_parameter_of_one_number_keeps_its_moments(tmp_path, ranks):
    tensors = {"embed.weight": torch.randn(1, 1), "0.out.weight": torch.randn(1, 1), "0.up.bias": torch.randn(1)}
    for stage in (1, 3):
        stored = open_stored(write_zero(tmp_path / str(stage), tensors, 1, 1, ranks, stage, None))
        for name, value in _expected(tensors).items():
            assert torch.equal(stored.tensor(name), value), (stage, name)
