"""DeepSpeed's mixtures of experts, trained and saved by the real library on four ranks."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from resilin.checkpoint.errors import CheckpointError, DamagedError
from resilin.checkpoint.foreign.convert import Options, convert, open_stored

RANKS, EXPERTS = 4, 4
KINDS = ["2-bf16-2-every", "1-fp32-1-every", "1-bf16-4-every", "1-bf16-2-consecutive"]
PLAIN = "0-fp32-2-every"


@pytest.fixture(scope="module")
def mixtures(run_on_ranks, tmp_path_factory) -> Path:
    """`STAGE-DTYPE-EP-ORDER/`, and beside each what each rank held, in files of their own."""
    pytest.importorskip("deepspeed")
    out = tmp_path_factory.mktemp("experts")
    kinds = [kind.replace("-", ":") for kind in (*KINDS, PLAIN)]
    run_on_ranks("deepspeed_run.py", "experts", out, *kinds, ranks=RANKS)
    return out


def _told(mixtures: Path, kind: str) -> dict[str, torch.Tensor]:
    """What the ranks held, experts by their number in the whole; ranks that hold the same must agree."""
    spread, order = int(kind.split("-")[2]), kind.split("-")[3]
    found: dict[str, torch.Tensor] = {}
    for rank in range(RANKS):
        part = rank // (RANKS // spread) if order == "consecutive" else rank % spread
        for name, tensor in load_file(mixtures / f"{kind}-{rank}.safetensors").items():
            whole = re.sub(
                r"(deepspeed_experts\.)(\d+)", lambda m, p=part: f"{m[1]}{p * (EXPERTS // spread) + int(m[2])}", name
            )
            assert torch.equal(found.setdefault(whole, tensor), tensor), whole
    return found


@pytest.mark.parametrize("kind", [*KINDS, PLAIN])
def test_every_expert_and_its_states_are_what_its_ranks_held(mixtures, kind):
    stored = open_stored(mixtures / kind)
    told = _told(mixtures, kind)
    steps = {name for name in stored.names if name.startswith("optimizer/step/")}
    assert set(stored.names) - steps == set(told)
    assert len([name for name in told if name.startswith("model/") and "deepspeed_experts" in name]) == 2 * 4 * EXPERTS
    for name, tensor in told.items():
        assert torch.equal(stored.tensor(name), tensor), name
    experts = [
        stored.tensor(f"model/first.deepspeed_moe.experts.deepspeed_experts.{n}.0.weight") for n in range(EXPERTS)
    ]
    assert not any(torch.equal(a, b) for n, a in enumerate(experts) for b in experts[:n])
    if kind != PLAIN:
        named = [name for group in stored.groups for name in group["parameters"]]
        assert sorted(named) == sorted(name.removeprefix("model/") for name in told if name.startswith("model/"))


def test_they_go_through_resilin_and_dcp_unchanged(mixtures, canonical_bytes, tmp_path):
    source = mixtures / KINDS[0]
    convert(source, tmp_path / "resilin")
    convert(tmp_path / "resilin", tmp_path / "dcp", Options(target_format="dcp"))
    assert canonical_bytes(tmp_path / "resilin") == canonical_bytes(source)
    assert canonical_bytes(tmp_path / "dcp") == canonical_bytes(source)
    assert open_stored(tmp_path / "dcp").groups == open_stored(source).groups


@pytest.mark.parametrize("target", ["universal", "deepspeed"])
def test_they_are_not_written_as_something_that_an_engine_would_misread(mixtures, tmp_path, target):
    with pytest.raises(CheckpointError, match=r"deepspeed_experts.0.0.weight' is of an expert of DeepSpeed's MoE"):
        convert(mixtures / KINDS[0], tmp_path / "out", Options(target_format=target))


def test_states_without_zero_are_refused_and_the_weights_read(mixtures, tmp_path):
    with pytest.raises(
        CheckpointError, match=r"expp_rank_0_mp_rank_00_optim_states.pt keeps optimizer states by position"
    ):
        convert(mixtures / PLAIN, tmp_path / "out")
    report = convert(mixtures / PLAIN, tmp_path / "out", Options(leave_out=["optimizer"]))
    assert report.tensors["model"][0] == 37


def _copy(source: Path, target: Path) -> Path:
    target.mkdir()
    for path in (source / "global_step3").iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    return target


def test_a_missing_expert_is_named(mixtures, tmp_path):
    folder = _copy(mixtures / KINDS[0], tmp_path / "cut")
    (folder / "layer_1_expert_2_mp_rank_00_model_states.pt").unlink()
    with pytest.raises(DamagedError, match="the file of expert 2 of MoE layer 1 is missing"):
        open_stored(folder)


def test_an_expert_of_another_step_is_found(mixtures, tmp_path):
    folder = _copy(mixtures / KINDS[0], tmp_path / "mixed")
    path = folder / "layer_1_expert_2_mp_rank_00_model_states.pt"
    content = torch.load(path, weights_only=True)
    torch.save({name: tensor * 2 for name, tensor in content.items()}, path)
    with pytest.raises(CheckpointError, match=r"second.deepspeed_moe.experts.deepspeed_experts.2.* is not the"):
        convert(folder, tmp_path / "out")


def test_ranks_in_another_order_than_the_settings_say_are_found(mixtures, tmp_path):
    """The ranks' rows do not say whose experts they are; the files of the experts do."""
    folder = _copy(mixtures / "1-bf16-2-consecutive", tmp_path / "order")
    path = folder / "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt"
    content = torch.load(path, weights_only=False)
    content["ds_config"]["use_data_before_expert_parallelism"] = False
    torch.save(content, path)
    with pytest.raises(CheckpointError, match=r"deepspeed_experts"):
        convert(folder, tmp_path / "out")
