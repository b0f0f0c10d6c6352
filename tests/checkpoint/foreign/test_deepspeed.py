"""DeepSpeed's checkpoints, written and opened by the real library on two ranks."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from resilin.checkpoint.errors import CheckpointError, DamagedError
from resilin.checkpoint.foreign.convert import Options, convert, open_stored

KINDS = ["1-bf16", "2-fp32", "3-bf16"]


def _told(folder: Path, kind: str) -> dict[str, torch.Tensor]:
    return load_file(folder / f"{kind}.safetensors")


@pytest.mark.parametrize("kind", KINDS)
def test_every_element_is_where_the_ranks_had_it(deepspeed_checkpoints, kind):
    stored = open_stored(deepspeed_checkpoints / kind)
    told = _told(deepspeed_checkpoints, kind)
    steps = [name for name in stored.names if name.startswith("optimizer/step/")]
    assert set(stored.names) - set(steps) == set(told) - {"model/head.weight"}
    for name in sorted(set(told) - {"model/head.weight"}):
        tensor = stored.tensor(name)
        assert tensor.dtype == told[name].dtype, name
        assert torch.equal(tensor, told[name]), name
    assert [float(stored.tensor(name)) for name in steps] == [3.0] * 7


@pytest.mark.parametrize("kind", KINDS)
def test_groups_keep_their_own_settings_and_name_their_parameters(deepspeed_checkpoints, kind):
    stored = open_stored(deepspeed_checkpoints / kind)
    assert [group["weight_decay"] for group in stored.groups] == [0.1, 0.0]
    assert [group["lr"] for group in stored.groups] == [1e-2, 2e-2]
    assert [group["parameters"] for group in stored.groups] == [
        ["embed.weight", "up.weight", "down.weight"],
        ["up.bias", "down.bias", "norm.weight", "norm.bias"],
    ]
    assert stored.step == 3
    assert stored.other["seen"] == {"tokens": 48}
    assert stored.ties == {"model/head.weight": "model/embed.weight"}


@pytest.mark.parametrize("kind", KINDS)
def test_through_every_format_and_back_gives_the_same_bytes(deepspeed_checkpoints, canonical_bytes, tmp_path, kind):
    source = deepspeed_checkpoints / kind
    convert(source, tmp_path / "resilin")
    convert(tmp_path / "resilin", tmp_path / "dcp", Options(target_format="dcp"))
    convert(tmp_path / "dcp", tmp_path / "again", Options(leave_out=["model/head.weight"]))
    convert(tmp_path / "again", tmp_path / "universal", Options(target_format="universal"))
    convert(tmp_path / "universal", tmp_path / "last")
    expected = canonical_bytes(source)
    assert canonical_bytes(tmp_path / "resilin") == expected
    assert canonical_bytes(tmp_path / "again") == expected
    assert canonical_bytes(tmp_path / "universal") == expected
    assert canonical_bytes(tmp_path / "last") == expected
    assert open_stored(tmp_path / "last").groups == open_stored(source).groups
    assert open_stored(tmp_path / "last").other["seen"] == {"tokens": 48}


def test_engines_of_other_stages_open_a_universal_folder_and_go_on(deepspeed_checkpoints, run_on_ranks, tmp_path):
    convert(deepspeed_checkpoints / "1-bf16", tmp_path / "universal", Options(target_format="universal"))
    run_on_ranks("deepspeed_run.py", "load", tmp_path, tmp_path / "universal", "2:fp32", "3:bf16")
    told = _told(deepspeed_checkpoints, "1-bf16")
    for kind in ("2-fp32", "3-bf16"):
        found = _told(tmp_path, kind)
        for name in told:
            if "frozen" not in name:  # DeepSpeed restores from such folders what its optimizer trains
                assert torch.equal(found[name], told[name]), (kind, name)


@pytest.mark.parametrize("kind", ["1-bf16", "3-bf16"])
def test_what_ds_to_universal_writes_is_read_as_the_same_state(deepspeed_checkpoints, canonical_bytes, tmp_path, kind):
    target = tmp_path / "universal" / "global_step3_universal"
    command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state"]
    folders = ["--input_folder", str(deepspeed_checkpoints / kind / "global_step3"), "--output_folder", str(target)]
    workers = ["--num_extract_workers", "1", "--num_merge_workers", "1"]
    done = subprocess.run([*command, *folders, *workers], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    ours, theirs = open_stored(deepspeed_checkpoints / kind), open_stored(tmp_path / "universal")
    assert canonical_bytes(theirs) == canonical_bytes(ours)
    assert theirs.groups == ours.groups
    assert theirs.step == 3


def _copy(source: Path, target: Path) -> Path:
    target.mkdir()
    for path in (source / "global_step3").iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    return target


def test_a_missing_rank_is_named(deepspeed_checkpoints, tmp_path):
    folder = _copy(deepspeed_checkpoints / "3-bf16", tmp_path / "cut")
    (folder / "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt").unlink()
    with pytest.raises(DamagedError, match="says that 2 data ranks wrote it, and there are files of 1"):
        open_stored(folder)
    folder = _copy(deepspeed_checkpoints / "3-bf16", tmp_path / "first")
    (folder / "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt").unlink()
    with pytest.raises(DamagedError, match="optim_states file of data rank 0, model rank 00 is missing"):
        open_stored(folder)


def test_a_file_cut_short_is_named(deepspeed_checkpoints, tmp_path):
    folder = _copy(deepspeed_checkpoints / "1-bf16", tmp_path / "cut")
    path = folder / "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt"
    path.write_bytes(path.read_bytes()[:-500])
    with pytest.raises(DamagedError, match=r"rank_1_mp_rank_00_optim_states.pt: is cut short or damaged"):
        open_stored(folder)


def _changed(folder: Path, name: str, change) -> None:
    from deepspeed.utils.tensor_fragment import fragment_address  # noqa: F401  # so that the real objects are made

    content = torch.load(folder / name, weights_only=False)
    change(content)
    torch.save(content, folder / name)


def test_a_missing_and_a_doubled_fragment_are_found(deepspeed_checkpoints, tmp_path):
    name = "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt"
    folder = _copy(deepspeed_checkpoints / "1-bf16", tmp_path / "missing")
    _changed(folder, name, lambda c: c["optimizer_state_dict"]["param_slice_mappings"][0].pop("down.weight"))
    with pytest.raises(CheckpointError, match=r"no file of model rank 00 has any part of 'down.weight' \[7, 5\]"):
        open_stored(folder)
    folder = _copy(deepspeed_checkpoints / "1-bf16", tmp_path / "part")
    _changed(folder, name, lambda c: c["optimizer_state_dict"]["param_slice_mappings"][0].pop("embed.weight"))
    with pytest.raises(CheckpointError, match=r"tensor 'model/embed.weight' \[13, 7\]: no place holds"):
        open_stored(folder)
    folder = _copy(deepspeed_checkpoints / "1-bf16", tmp_path / "doubled")

    def double(content):
        fragments = content["optimizer_state_dict"]["param_slice_mappings"][0]
        fragments["embed.weight"].numel += 1

    _changed(folder, name, double)
    with pytest.raises(CheckpointError, match=r"fragment of 'embed.weight' the ranks have 92 of its 91 elements"):
        open_stored(folder)


def test_a_low_precision_copy_of_another_step_is_found(deepspeed_checkpoints, tmp_path):
    folder = _copy(deepspeed_checkpoints / "1-bf16", tmp_path / "mixed")
    _changed(folder, "mp_rank_00_model_states.pt", lambda c: c["module"]["up.weight"].mul_(1.1))
    with pytest.raises(CheckpointError, match=r"BF16|bfloat16 copy of 'model/up.weight' .* is not the"):
        convert(folder, tmp_path / "out")
    assert not list((tmp_path / "out").glob("step-*"))
    convert(folder, tmp_path / "out", Options(leave_out=["rounded/up.weight"]))


def test_a_state_without_a_rule_is_refused_by_name(deepspeed_checkpoints, tmp_path):
    folder = _copy(deepspeed_checkpoints / "1-bf16", tmp_path / "factored")

    def add(content):
        content["optimizer_state_dict"]["base_optimizer_state"]["state"][0]["row_factor"] = torch.ones(5)

    _changed(folder, "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt", add)
    with pytest.raises(CheckpointError, match=r"state 'row_factor' of group 0 is torch.float32 .5.: neither as long"):
        open_stored(folder)


def test_a_state_that_one_rank_lost_is_found(deepspeed_checkpoints, tmp_path):
    folder = _copy(deepspeed_checkpoints / "1-bf16", tmp_path / "lost")

    def lose(content):
        del content["optimizer_state_dict"]["base_optimizer_state"]["state"][0]["exp_avg"]

    _changed(folder, "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt", lose)
    with pytest.raises(CheckpointError, match=r"only one has exp_avg of 'embed.weight'"):
        open_stored(folder)


def test_any_state_as_long_as_the_masters_is_cut_like_them(deepspeed_checkpoints, tmp_path):
    folder = _copy(deepspeed_checkpoints / "1-bf16", tmp_path / "third")
    for rank in range(2):

        def add(content):
            states = content["optimizer_state_dict"]["base_optimizer_state"]["state"]
            for state in states.values():
                state["third_moment"] = state["exp_avg"] * 2

        _changed(folder, f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt", add)
    stored = open_stored(folder)
    for name in stored.under("optimizer/exp_avg/"):
        assert torch.equal(stored.tensor(name.replace("exp_avg", "third_moment")), stored.tensor(name) * 2)


def test_a_pipeline_with_tied_embeddings_is_put_together(run_on_ranks, canonical_bytes, tmp_path):
    pytest.importorskip("deepspeed")
    run_on_ranks("deepspeed_run.py", "pipeline", tmp_path / "pipeline")
    stored = open_stored(tmp_path / "pipeline")
    told = [load_file(tmp_path / "pipeline" / f"rank-{rank}.safetensors") for rank in range(2)]
    both = told[0].keys() & told[1].keys()
    assert both == {"model/tied_modules.embed.weight", "optimizer/exp_avg/tied_modules.embed.weight"}
    names = {n for n in stored.names if n.startswith(("model/", "optimizer/exp_avg/"))}
    assert names == told[0].keys() | told[1].keys()
    for rank in told:
        for name, tensor in rank.items():
            assert torch.equal(stored.tensor(name), tensor), name
    convert(tmp_path / "pipeline", tmp_path / "resilin")
    assert canonical_bytes(tmp_path / "resilin") == canonical_bytes(stored)

    def mix(content):
        content["inner.weight"] += 1

    _changed(tmp_path / "pipeline" / "global_step2", "layer_01-model_states.pt", mix)
    with pytest.raises(CheckpointError, match=r"layer_01-model_states.pt.* copy of 'model/1.inner.weight' .* not the"):
        convert(tmp_path / "pipeline", tmp_path / "mixed")


def test_a_file_of_states_of_an_unknown_kind_is_refused(deepspeed_checkpoints, tmp_path):
    folder = _copy(deepspeed_checkpoints / "1-bf16", tmp_path / "more")
    (folder / "other_model_states.pt").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"other_model_states.pt: is a file of states, but of no kind"):
        open_stored(folder)
