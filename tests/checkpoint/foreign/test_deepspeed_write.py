"""Written ZeRO folders: the real library opens them, and its engines go on as if they had never stopped."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from resilin.checkpoint.errors import CheckpointError
from resilin.checkpoint.folder import CheckpointFolder
from resilin.checkpoint.foreign.convert import Options, convert, open_stored
from resilin.checkpoint.foreign.deepspeed_write import Zero
from resilin.checkpoint.foreign.formats import WriteOptions
from resilin.checkpoint.foreign.pickles import Record, load_pickle, plain
from resilin.checkpoint.foreign.zero_rows import group_rows, sub_group_rows

KINDS = ["1-bf16", "2-fp32", "3-bf16"]


def _to(stage: int, ranks: int, sub_group_size: int = 60, **options) -> Options:
    zero = Zero(stage, ranks, sub_group_size)
    return Options(target_format="deepspeed", write=WriteOptions(zero=zero), **options)


@pytest.fixture(scope="module")
def written(deepspeed_checkpoints, tmp_path_factory) -> Path:
    """`KIND/`: what DeepSpeed wrote, taken to Resilin and back to the same stage and ranks."""
    out = tmp_path_factory.mktemp("written")
    for kind in KINDS:
        convert(deepspeed_checkpoints / kind, out / f"{kind}-resilin")
        convert(out / f"{kind}-resilin", out / kind, _to(int(kind[0]), 2))
    return out


def _assert_same(told: dict[str, torch.Tensor], found: dict[str, torch.Tensor]) -> None:
    assert told.keys() == found.keys()
    different = [name for name in told if not torch.equal(told[name], found[name])]
    assert different == []


def test_engines_go_on_bit_for_bit_as_if_they_had_never_stopped(deepspeed_checkpoints, written, run_on_ranks, tmp_path):
    kinds = [f"{kind.replace('-', ':')}={written / kind}" for kind in KINDS]
    run_on_ranks("deepspeed_run.py", "resume", tmp_path, *kinds)
    for kind in KINDS:
        for when in (kind, f"{kind}-later"):
            _assert_same(
                load_file(deepspeed_checkpoints / f"{when}.safetensors"), load_file(tmp_path / f"{when}.safetensors")
            )


@pytest.mark.slow
def test_engines_of_other_stages_precisions_and_ranks_open_them(deepspeed_checkpoints, run_on_ranks, tmp_path):
    convert(deepspeed_checkpoints / "2-fp32", tmp_path / "first", _to(1, 3))
    convert(deepspeed_checkpoints / "2-fp32", tmp_path / "third", _to(3, 3, dtype=torch.bfloat16))
    kinds = [f"1:fp32={tmp_path / 'first'}", f"3:bf16={tmp_path / 'third'}"]
    run_on_ranks("deepspeed_run.py", "resume", tmp_path / "out", *kinds, ranks=3)
    told = load_file(deepspeed_checkpoints / "2-fp32.safetensors")
    _assert_same(told, load_file(tmp_path / "out" / "1-fp32.safetensors"))
    found = load_file(tmp_path / "out" / "3-bf16.safetensors")
    for name in [name for name in told if "frozen" in name]:  # which such an engine has in bf16 alone
        found[name], told[name] = found[name], told[name].bfloat16()
    _assert_same(told, found)


def _differences(ours, theirs, path: str = "") -> list[str]:
    """Where two trees of a pickle differ; an enumeration is as good as its number."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        found = [f"{path}/{key}: only one has it" for key in ours.keys() ^ theirs.keys()]
        return found + [
            d for key in ours.keys() & theirs.keys() for d in _differences(ours[key], theirs[key], f"{path}/{key}")
        ]
    if isinstance(ours, (list, tuple)) and type(ours) is type(theirs) and len(ours) == len(theirs):
        return [d for n, (a, b) in enumerate(zip(ours, theirs, strict=True)) for d in _differences(a, b, f"{path}/{n}")]
    if isinstance(ours, torch.Tensor):
        return [] if ours.dtype == theirs.dtype and torch.equal(ours, theirs) else [path]
    if isinstance(ours, Record) or isinstance(theirs, Record):
        same = plain(ours, path) == plain(theirs, path)
        return [] if same and (path.endswith("zero_stage") or type(ours).foreign == type(theirs).foreign) else [path]
    return [] if ours == theirs else [f"{path}: {ours!r}, not {theirs!r}"]


def _clear_padding(content: dict, shapes: list[dict[str, torch.Size]]) -> None:
    """Zero in the last of two ranks what pads parameters of an odd size: in stage 3 whatever the memory had."""
    for row in (content.get("frozen_param_fragments") or {}).values():
        row[-1] = 0  # 49 and 7 elements
    state = content.get("optimizer_state_dict")
    for number, group in enumerate(shapes if state else []):
        ends = torch.tensor([-(-shape.numel() // 2) for shape in group.values()]).cumsum(0) - 1
        odd = ends[[shape.numel() % 2 == 1 for shape in group.values()]]
        moments = state["optimizer_state_dict"]["state"][number]
        for row in (state["fp32_flat_groups"][number], moments["exp_avg"], moments["exp_avg_sq"]):
            row.detach()[odd] = 0


@pytest.mark.parametrize("kind", KINDS)
def test_the_files_are_those_that_deepspeed_itself_wrote(deepspeed_checkpoints, written, kind):
    theirs = deepspeed_checkpoints / kind / "global_step3"
    ours = written / kind / "global_step3"
    names = sorted(path.name for path in theirs.iterdir())
    assert sorted(path.name for path in ours.iterdir()) == names
    assert (ours.parent / "latest").read_text() == (theirs.parent / "latest").read_text()
    for name in names:
        one, other = load_pickle(ours / name), load_pickle(theirs / name)
        for content in (one, other):
            del content["ds_config"]
        if kind == "1-bf16" and "module" in one:  # whose engines leave them out, so that zero_to_fp32 loses them
            assert one.pop("frozen_param_shapes").keys() == {"frozen.weight", "frozen.bias"}
            assert one.pop("frozen_param_fragments")
            assert other.pop("frozen_param_shapes") is other.pop("frozen_param_fragments") is None
        if kind == "3-bf16" and "_rank_1_" in name:
            if "module" in one:  # DeepSpeed tells the first rank alone of ties
                assert one.pop("shared_params") == {"head.weight": "embed.weight"}
                assert other.pop("shared_params") == {}
            shapes = load_pickle(theirs / "zero_pp_rank_1_mp_rank_00_model_states.pt")["param_shapes"]
            for content in (one, other):
                _clear_padding(content, shapes)
        assert _differences(one, other) == []


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ranks", [1, 3, 50])
def test_read_again_it_is_the_same_checkpoint(deepspeed_checkpoints, canonical_bytes, tmp_path, kind, ranks):
    source = open_stored(deepspeed_checkpoints / kind)
    for stage in (1, 2, 3):
        target = tmp_path / str(stage)
        convert(deepspeed_checkpoints / kind, target, _to(stage, ranks))
        again = open_stored(target)
        assert again.title == f"DeepSpeed ZeRO-{stage} ({ranks} data, 1 tensor, 1 pipeline ranks)"
        assert canonical_bytes(again) == canonical_bytes(source)
        assert again.groups == source.groups
        assert again.other == source.other
        assert again.ties == source.ties == {"model/head.weight": "model/embed.weight"}
        assert again.frozen == source.frozen == {"frozen.weight", "frozen.bias"}
        assert again.step == 3


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_deepspeeds_own_zero_to_fp32_gives_the_masters(deepspeed_checkpoints, tmp_path, stage):
    pytest.importorskip("deepspeed")
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    convert(deepspeed_checkpoints / "1-bf16", tmp_path / "zero", _to(stage, 3))
    found = get_fp32_state_dict_from_zero_checkpoint(str(tmp_path / "zero"))
    told = load_file(deepspeed_checkpoints / "1-bf16.safetensors")
    expected = {name.removeprefix("model/"): one for name, one in told.items() if name.startswith("model/")}
    expected.setdefault("head.weight", expected["embed.weight"])
    assert found.keys() == expected.keys()
    for name, one in expected.items():
        assert torch.equal(found[name], one), name


@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeeds_own_ds_to_universal_reads_it(deepspeed_checkpoints, canonical_bytes, tmp_path, stage):
    convert(deepspeed_checkpoints / "1-bf16", tmp_path / "zero", _to(stage, 3))
    command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state"]
    target = tmp_path / "universal" / "global_step3_universal"
    folders = ["--input_folder", str(tmp_path / "zero" / "global_step3"), "--output_folder", str(target)]
    workers = ["--num_extract_workers", "1", "--num_merge_workers", "1"]
    done = subprocess.run([*command, *folders, *workers], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert canonical_bytes(tmp_path / "universal") == canonical_bytes(deepspeed_checkpoints / "1-bf16")


SHAPES = st.lists(st.integers(1, 7), max_size=3).map(tuple)


@settings(max_examples=60, deadline=None)
@given(st.lists(SHAPES, min_size=1, max_size=6), st.integers(1, 9), st.integers(1, 40))
def test_rows_hold_every_element_once(shapes, ranks, sub_group_size):
    named = {str(number): shape for number, shape in enumerate(shapes)}
    whole = group_rows(0, named, ranks)
    cut = sub_group_rows(0, named, ranks, sub_group_size)
    assert [name for rows in cut for name in rows.shapes] == list(named)
    for rows in (whole, *cut):
        flat = [torch.full((rows.size,), -1) for _ in range(ranks)]
        numbered, first = {}, 0
        for name, shape in rows.shapes.items():
            numbered[name] = torch.arange(first, first + math.prod(shape)).reshape(shape)
            rows.scatter(name, numbered[name], flat)
            first += math.prod(shape)
        assert sorted(torch.cat(flat)[torch.cat(flat) >= 0].tolist()) == list(range(first))
        for rank, padding in enumerate(rows.paddings):
            assert (flat[rank][rows.size - padding :] == -1).all()
        for name, expected in numbered.items():
            parts = [(rank, rows.address(name, rank)) for rank in range(ranks)]
            found = [flat[rank][one[0] : one[0] + one[1]] for rank, one in parts if one is not None]
            assert torch.equal(torch.cat(found), expected.flatten())
    assert whole.size % 2 == 0
    assert whole.size * ranks - sum(whole.paddings) == sum(math.prod(shape) for shape in shapes)
    assert all(
        sum(-(-math.prod(shape) // ranks) for shape in list(rows.shapes.values())[:-1]) < sub_group_size for rows in cut
    )


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.lists(SHAPES, min_size=1, max_size=4), min_size=1, max_size=3),
    st.lists(st.lists(st.integers(0, 7), max_size=3).map(tuple), max_size=2),
    st.sampled_from([1, 2, 3]),
    st.integers(1, 6),
    st.integers(1, 30),
)
def test_any_model_comes_back_the_same(tmp_path_factory, canonical_bytes, groups, frozen, stage, ranks, sub_group_size):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("any")
    names = [[f"g{group}.{number}" for number in range(len(shapes))] for group, shapes in enumerate(groups)]
    shapes = dict(zip((n for group in names for n in group), (s for group in groups for s in group), strict=True))
    model = {name: torch.randn(shape) for name, shape in shapes.items()}
    moments = {
        name: {"exp_avg": torch.randn(shape), "exp_avg_sq": torch.rand(shape), "step": torch.tensor(4.0)}
        for name, shape in shapes.items()
    }
    state = {
        "model": {**model, "running_mean": torch.randn(5), "count": torch.tensor(7)},
        "frozen": {f"f{number}": torch.randn(shape).bfloat16() for number, shape in enumerate(frozen)},
        "optimizer": {"parameters": moments, "groups": [{"lr": 0.1, "parameters": group} for group in names]},
    }
    CheckpointFolder(folder / "source").save(4, state)
    convert(folder / "source", folder / "zero", _to(stage, ranks, sub_group_size))
    source, again = open_stored(folder / "source"), open_stored(folder / "zero")
    assert canonical_bytes(again) == canonical_bytes(source)
    assert again.groups == source.groups
    assert again.frozen == source.frozen


@pytest.fixture
def trained(tmp_path) -> dict:
    """A state of two parameters, which a test changes before it is saved."""
    return {
        "model": {"a": torch.ones(5, 3), "b": torch.ones(7)},
        "optimizer": {
            "parameters": {
                name: {"exp_avg": torch.ones(shape), "step": torch.tensor(4.0)}
                for name, shape in (("a", (5, 3)), ("b", (7,)))
            },
            "groups": [{"lr": 0.1, "parameters": ["a", "b"]}],
        },
    }


def _refused(folder: Path, state: dict, message: str, options: Options | None = None) -> None:
    CheckpointFolder(folder / "source").save(4, state)
    with pytest.raises(CheckpointError, match=message):
        convert(folder / "source", folder / "zero", options or _to(2, 2))
    assert not (folder / "zero").exists()


def test_parameters_of_one_group_at_different_steps_are_refused(trained, tmp_path):
    trained["optimizer"]["parameters"]["b"]["step"] = torch.tensor(3.0)
    _refused(tmp_path, trained, r"'optimizer/step/b' is 3.0, and 4.0 for others of its parameter group")


def test_a_state_of_another_shape_is_refused(trained, tmp_path):
    trained["optimizer"]["parameters"]["a"]["row_factor"] = torch.ones(5)
    _refused(tmp_path, trained, r"'optimizer/row_factor/a' is \[5\], neither as its parameter \[5, 3\] nor one number")


def test_a_state_that_only_one_parameter_has_is_refused(trained, tmp_path):
    del trained["optimizer"]["parameters"]["b"]["exp_avg"]
    _refused(tmp_path, trained, "of 'a' and 'b', which are of one parameter group, only one has exp_avg")


def test_masters_that_float32_does_not_hold_are_refused(trained, tmp_path):
    trained["model"]["a"] = trained["model"]["a"].double()
    _refused(tmp_path, trained, "'model/a' is torch.float64: DeepSpeed's are float32")


def test_parameters_without_elements_are_refused(trained, tmp_path):
    trained["model"]["none"] = torch.empty(0, 3)
    trained["optimizer"]["groups"][0]["parameters"].append("none")
    _refused(tmp_path, trained, "group 0 has 'none', which has no elements")


def test_a_loss_scaler_that_stage_3_needs_and_the_source_lacks_is_asked_for(trained, tmp_path):
    _refused(tmp_path, trained, "stage 3 .* none for float16", _to(3, 2, dtype=torch.float16))


def test_stage_3_asks_which_of_the_untrained_tensors_are_parameters(trained, tmp_path):
    trained["model"]["mask"] = torch.arange(4.0)
    _refused(tmp_path, trained, r"'mask' is not trained, .* Name the frozen ones: --frozen PATTERN", _to(3, 2))
    for name, frozen in (("cut", ["ma*"]), ("whole", [""])):
        convert(tmp_path / "source", tmp_path / name, _to(3, 2, frozen=frozen))
        content = load_pickle(tmp_path / name / "global_step4" / "zero_pp_rank_1_mp_rank_00_model_states.pt")
        assert content["module"]["mask"].numel() == (0 if name == "cut" else 4)
        assert content["buffer_names"] == ([] if name == "cut" else ["mask"])
        assert torch.equal(open_stored(tmp_path / name).tensor("model/mask"), torch.arange(4.0))
    for pattern, message in (("b", "'b', which a parameter group has"), ("gone", "matches nothing")):
        with pytest.raises(CheckpointError, match=message):
            convert(tmp_path / "source", tmp_path / "wrong", _to(3, 2, frozen=[pattern]))


def test_a_dynamic_loss_scaler_is_deepspeeds_own_object_again(trained, tmp_path):
    scaler = pytest.importorskip("deepspeed.runtime.fp16.loss_scaler")
    first = scaler.DynamicLossScaler(2**12, 500, 1.0, 2, False)
    first.update_scale(overflow=False)
    torch.save({"scaler": first}, tmp_path / "scaler.pt")
    trained["deepspeed"] = {"loss_scaler": plain(load_pickle(tmp_path / "scaler.pt"), "")["scaler"], "dtype": "float16"}
    CheckpointFolder(tmp_path / "source").save(4, trained)
    for stage in (2, 3):
        convert(tmp_path / "source", tmp_path / str(stage), _to(stage, 2))
        file = tmp_path / str(stage) / "global_step4" / "zero_pp_rank_1_mp_rank_00_optim_states.pt"
        found = torch.load(file, weights_only=False)["optimizer_state_dict"]["loss_scaler"]
        assert type(found) is scaler.DynamicLossScaler
        assert vars(found) == vars(first)


def test_the_command_takes_stage_ranks_and_precision(trained, tmp_path):
    from typer.testing import CliRunner

    from resilin.cli.main import app

    CheckpointFolder(tmp_path / "source").save(4, trained)
    command = ["checkpoint", "convert", str(tmp_path / "source"), str(tmp_path / "zero"), "--to", "deepspeed"]
    options = ["--zero-stage", "3", "--data-parallel", "2", "--sub-group-size", "5", "--dtype", "bfloat16"]
    result = CliRunner().invoke(app, [*command, *options])
    assert result.exit_code == 0, result.output
    files = sorted(path.name for path in (tmp_path / "zero" / "global_step4").iterdir())
    assert files == [
        "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt",
        "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt",
        "zero_pp_rank_0_mp_rank_00_model_states.pt",
        "zero_pp_rank_1_mp_rank_00_model_states.pt",
    ]
    content = load_pickle(tmp_path / "zero" / "global_step4" / files[2])
    assert [list(group) for group in content["param_shapes"]] == [["a"], ["b"]]
    assert content["module"]["a"].dtype == torch.bfloat16
