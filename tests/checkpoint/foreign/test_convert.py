"""Conversion as a whole: what it refuses, what an interruption leaves, how much memory it takes, what it says."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from resilin.checkpoint.errors import CheckpointError
from resilin.checkpoint.folder import CheckpointFolder
from resilin.checkpoint.foreign.convert import Options, convert, open_stored
from resilin.checkpoint.foreign.formats import ReadOptions, WriteOptions
from resilin.checkpoint.foreign.rules import Rules
from resilin.checkpoint.foreign.stored import Stored


@pytest.fixture
def trained(tmp_path) -> Path:
    """A small checkpoint of Resilin with optimizer, groups, other values, and a tied weight."""
    torch.manual_seed(0)
    a, b = torch.randn(5, 3), torch.randn(7)
    moments = {
        name: {"exp_avg": torch.randn(shape), "step": torch.tensor(4.0)} for name, shape in (("a", (5, 3)), ("b", 7))
    }
    state = {
        "model": {"a": a, "b": b, "head": a},
        "optimizer": {"parameters": moments, "groups": [{"lr": 0.1, "parameters": ["a", "b"]}]},
        "run": {"samples": 9, "noise": torch.arange(3)},
    }
    CheckpointFolder(tmp_path / "trained").save(4, state)
    return tmp_path / "trained"


@pytest.mark.parametrize("target", ["dcp", "universal", "deepspeed"])
def test_there_and_back_is_the_same_checkpoint(trained, tmp_path, canonical_bytes, target):
    convert(trained, tmp_path / "there", Options(target_format=target))
    left = ["model/head"] if target == "dcp" else []  # which writes a tied weight twice, and says nothing of it
    convert(tmp_path / "there", tmp_path / "back", Options(leave_out=left))
    assert canonical_bytes(tmp_path / "back") == canonical_bytes(trained)
    first, last = open_stored(trained), open_stored(tmp_path / "back")
    assert last.step == first.step == 4
    assert last.groups == first.groups
    assert last.other["run"] == first.other["run"]


class _Runs:
    def __reduce__(self):
        return print, ("this ran",)


def test_a_pickle_that_would_run_code_is_refused_by_name(tmp_path, capsys):
    (tmp_path / "model").mkdir()
    path = tmp_path / "model" / "pytorch_model.bin"
    torch.save({"a": torch.ones(2), "b": _Runs()}, path)
    with pytest.raises(CheckpointError, match=r"pytorch_model.bin: holds a builtins.print, which is neither"):
        open_stored(tmp_path / "model")
    # Even when it is allowed, what comes of it is a record: nothing is called.
    with pytest.raises(CheckpointError, match="should hold a dict of tensors"):
        open_stored(tmp_path / "model", None, ReadOptions(allow=("builtins.print",)))
    assert "this ran" not in capsys.readouterr().out


def test_a_folder_of_nothing_known_is_refused(tmp_path):
    (tmp_path / "some").mkdir()
    with pytest.raises(CheckpointError, match="no checkpoint of a format known here: resilin, dcp, universal"):
        convert(tmp_path / "some", tmp_path / "out")
    with pytest.raises(CheckpointError, match="there is no such folder"):
        convert(tmp_path / "none", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_target_that_is_there_is_not_touched(trained, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("kept")
    with pytest.raises(CheckpointError, match="is there already, and not an empty folder"):
        convert(trained, tmp_path / "out", Options(target_format="dcp"))
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine"]


def test_a_name_to_leave_out_that_matches_nothing_is_refused(trained, tmp_path):
    with pytest.raises(CheckpointError, match="--leave-out 'model/z' matches nothing"):
        convert(trained, tmp_path / "out", Options(leave_out=["model/z"]))


@pytest.mark.parametrize("target", ["resilin", "dcp", "universal", "deepspeed"])
@pytest.mark.parametrize("failure", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("after", [0, 1, 4])
def test_an_interrupted_conversion_leaves_nothing_to_read(trained, tmp_path, monkeypatch, target, failure, after):
    count = iter(range(100))
    whole = Stored.tensor

    def tensor(self, name):
        if next(count) == after:
            raise failure
        return whole(self, name)

    monkeypatch.setattr(Stored, "tensor", tensor)
    expected = CheckpointError if isinstance(failure, OSError) else KeyboardInterrupt
    with pytest.raises(expected):
        convert(trained, tmp_path / "out", Options(target_format=target))
    monkeypatch.undo()
    left = [path for path in (tmp_path / "out").rglob("*") if not path.name.startswith(".")]
    assert left == []
    assert not list(tmp_path.glob(".converting-*"))
    convert(trained, tmp_path / "out", Options(target_format=target))
    assert open_stored(tmp_path / "out").names


def test_a_killed_conversion_leaves_nothing_to_read(trained, tmp_path):
    code = f"""
import os, signal
from pathlib import Path
from resilin.checkpoint.foreign import dcp_write
from resilin.checkpoint.foreign.convert import Options, convert
dcp_write.pickle.dumps = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
convert(Path({str(trained)!r}), Path({str(tmp_path / "out")!r}), Options(target_format="dcp"))
"""
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == -9
    assert not (tmp_path / "out").exists()
    (half,) = tmp_path.glob(".converting-*")
    with pytest.raises(CheckpointError):
        open_stored(half / "out")


MEMORY = """
import sys, threading, time
from pathlib import Path
import torch
from resilin.checkpoint.foreign.convert import Options, convert

def anonymous():
    text = Path("/proc/self/status").read_text()
    return int(text.split("RssAnon:")[1].split()[0]) * 1024

convert(Path(sys.argv[1]), Path(sys.argv[2]) / "first", Options(target_format=sys.argv[3]))  # imports, pools
base, peak, done = anonymous(), [0], False
def watch():
    while not done:
        peak[0] = max(peak[0], anonymous())
        time.sleep(0.001)
thread = threading.Thread(target=watch)
thread.start()
convert(Path(sys.argv[1]), Path(sys.argv[2]) / "second", Options(target_format=sys.argv[3]))
done = True
thread.join()
print(peak[0] - base)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
@pytest.mark.parametrize("target", ["resilin", "dcp", "deepspeed"])
def test_memory_holds_a_few_of_the_largest_tensor_not_the_model(tmp_path, target):
    """24 tensors of 8 MiB: a quarter of the model would be too much."""
    import torch.distributed.checkpoint as dcp

    largest, tensors = 8 << 20, 24
    model = {f"t{n}": torch.full((largest // 4,), float(n)) for n in range(tensors)}
    optim = {"state": {}, "param_groups": [{"lr": 0.1, "params": list(model)}]}
    dcp.save({"model": model, "optim": optim}, checkpoint_id=tmp_path / "source")
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, str(tmp_path / "source"), str(tmp_path), target],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 6 * largest


def test_the_command_says_what_it_read_wrote_and_left_out(trained, tmp_path):
    from resilin.cli.main import app

    arguments = [
        "checkpoint",
        "convert",
        str(trained),
        str(tmp_path / "out"),
        "--to",
        "dcp",
        "--leave-out",
        "other/run",
    ]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    words = " ".join(result.output.split())
    assert "Resilin checkpoint ->" in words
    assert "model 2 tensors 88 bytes" in words
    assert "optimizer 4 tensors 96 bytes" in words
    assert "tied: model/head is model/a" in words
    assert "left out: other/run (asked for)" in words
    assert sorted(open_stored(tmp_path / "out").other) == []


def test_a_runs_own_model_is_not_taken_for_a_hugging_face_model(trained, tmp_path):
    options = Options(target_format="huggingface", weights_only=True)
    with pytest.raises(CheckpointError, match="resilin export"):
        convert(trained, tmp_path / "out", options)


def test_an_atom_that_is_missing_or_cut_is_named(trained, tmp_path):
    convert(trained, tmp_path / "universal", Options(target_format="universal", leave_out=["model/head"]))
    zero = tmp_path / "universal" / "global_step4_universal" / "zero"
    whole = (zero / "a" / "exp_avg.pt").read_bytes()
    (zero / "a" / "exp_avg.pt").write_bytes(whole[:100])
    with pytest.raises(CheckpointError, match=r"a/exp_avg.pt: is cut short or damaged"):
        open_stored(tmp_path / "universal")
    (zero / "a" / "exp_avg.pt").unlink()
    with pytest.raises(CheckpointError, match=r"a/exp_avg.pt: the file is missing; others of its group have it"):
        open_stored(tmp_path / "universal")
    (zero / "a" / "step.pt").unlink()
    with pytest.raises(CheckpointError, match=r"optimizer/\*/a cannot be converted: there is no optimizer state of it"):
        convert(tmp_path / "universal", tmp_path / "out")
    (zero / "a" / "fp32.pt").unlink()
    with pytest.raises(CheckpointError, match=r"a: has no fp32.pt, though the parameter is trained"):
        open_stored(tmp_path / "universal")


def test_rules_say_how_atoms_are_cut_again(trained, tmp_path):
    table = {
        "parameter_with_row_parallelism_patterns": ["a"],
        "parameter_with_2_sub_params_cat_dim_0": ["b"],
        "vocabulary_parameter_patterns": ["a"],
    }
    write = WriteOptions(rules=table)
    convert(trained, tmp_path / "universal", Options(target_format="universal", write=write))
    zero = tmp_path / "universal" / "global_step4_universal" / "zero"
    marks = {
        name: {k: v for k, v in torch.load(zero / name / "exp_avg.pt", weights_only=True).items() if k != "param"}
        for name in ("a", "b")
    }
    assert marks == {"a": {"cat_dim": 1, "vocab_tensor": True}, "b": {"cat_dim": 0, "param_n_sub_params": 2}}
    for wrong, message in (
        ({"parameter_with_row_parallelism_patterns": ["gone"]}, "'gone' matches no trained parameter"),
        (
            {"parameter_with_sub_params": [{"patterns": ["a"], "shape": [[2, 2], -1], "partition_dim": 0}]},
            r"sub-parameters of \[2, 2\] do not make up dimension 0 of 'a' \[5, 3\]",
        ),
    ):
        options = Options(target_format="universal", write=WriteOptions(rules=wrong))
        with pytest.raises(CheckpointError, match=message):
            convert(trained, tmp_path / "other", options)
        assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(("name", "dim", "parts"), [("a", 0, [4, 2, 2]), ("b", 1, [2, 4]), ("a", 0, 4)])
def test_deepspeed_cuts_several_parameters_in_one_over_tensor_ranks(tmp_path, name, dim, parts):
    """What its own loader gives each rank makes up the whole again by the same rules."""
    module = pytest.importorskip("deepspeed.checkpoint.universal_checkpoint")
    from deepspeed.utils.tensor_fragment import fragment_address, tensor_fragment

    model = {"a": torch.randn(8, 3), "b": torch.randn(2, 6)}
    moments = {key: {"exp_avg": torch.randn(tensor.shape)} for key, tensor in model.items()}
    groups = [{"lr": 0.1, "parameters": ["a", "b"]}]
    CheckpointFolder(tmp_path / "run").save(
        1, {"model": model, "optimizer": {"parameters": moments, "groups": groups}, "deepspeed": {}}
    )
    shape = [-1, -1]
    shape[dim] = parts
    table = {"parameter_with_sub_params": [{"patterns": [name], "shape": shape, "partition_dim": dim}]}
    options = Options(target_format="universal", write=WriteOptions(rules=table))
    convert(tmp_path / "run", tmp_path / "universal", options)
    whole = model[name]
    shards = []
    for rank in range(2):
        local = list(whole.shape)
        local[dim] //= 2
        parameter = torch.nn.Parameter(torch.zeros(local))
        address = fragment_address(parameter.numel(), 0)
        master = torch.zeros(parameter.numel())
        parameter._hp_mapping = tensor_fragment(None, address, master, address, {}, {}, False, 0)
        folder = tmp_path / "universal" / "global_step1_universal" / "zero" / name
        module.load_hp_checkpoint_state(parameter, str(folder), rank, 2)
        shards.append((master.reshape(local), parameter._hp_mapping.optim_fragment["exp_avg"].reshape(local)))
    union = Rules(table, "the test").union(name, [tuple(shard.shape) for shard, _ in shards])
    for number, expected in enumerate((whole, moments[name]["exp_avg"])):
        made = torch.full_like(expected, float("nan"))
        for rank, slice_ in enumerate(union.slices):
            for piece in slice_.pieces:
                ends = tuple(slice(o, o + s) for o, s in zip(piece.offsets, piece.local.sizes, strict=True))
                made[ends] = shards[rank][number][piece.local.slices]
        assert torch.equal(made, expected)
    stored = open_stored(tmp_path / "universal")
    assert torch.equal(stored.tensor(f"model/{name}"), whole)


def test_a_universal_folder_of_tensor_parallel_ranks_is_read(trained, tmp_path):
    """Its model files have the shapes of shards, its atoms those of the whole."""
    convert(trained, tmp_path / "universal", Options(target_format="universal", leave_out=["model/head"]))
    folder = tmp_path / "universal" / "global_step4_universal"
    (folder / "zero_pp_rank_0_mp_rank_00_model_states.pt").unlink()
    content = torch.load(folder / "mp_rank_00_model_states.pt", weights_only=False)
    content["param_shapes"] = [{"a": torch.Size([5, 2]), "b": torch.Size([4])}]
    for rank in range(2):
        content["module"] = {"scale": torch.ones(3), "frozen": torch.full((2,), float(rank))}
        torch.save(content, folder / f"mp_rank_{rank:02d}_model_states.pt")
    stored, first = open_stored(tmp_path / "universal"), open_stored(trained)
    for name in ("model/a", "model/b", "optimizer/exp_avg/a", "optimizer/exp_avg/b"):
        assert torch.equal(stored.tensor(name), first.tensor(name)), name
    assert torch.equal(stored.tensor("model/scale"), torch.ones(3))
    with pytest.raises(CheckpointError, match=r"model/frozen cannot be converted: .* have different values of it"):
        convert(tmp_path / "universal", tmp_path / "out")


def test_a_value_with_a_name_of_deepspeeds_own_is_refused(tmp_path):
    groups = [{"lr": 0.1, "parameters": ["a"]}]
    state = {"model": {"a": torch.ones(2)}, "optimizer": {"groups": groups}, "lr_scheduler": {"mine": 1}}
    CheckpointFolder(tmp_path / "run").save(1, state)
    with pytest.raises(CheckpointError, match="'other/lr_scheduler' has the name of something that DeepSpeed keeps"):
        convert(tmp_path / "run", tmp_path / "out", Options(target_format="universal"))
    assert not (tmp_path / "out").exists()


def test_a_step_that_the_target_has_already_is_not_replaced(trained, tmp_path):
    convert(trained, tmp_path / "out")
    with pytest.raises(CheckpointError, match="has a checkpoint of step 4 already"):
        convert(trained, tmp_path / "out")


def test_a_pointer_that_leads_out_of_the_folder_is_refused(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "latest").write_text("../other")
    with pytest.raises(CheckpointError, match=r"names the file '../other', which leads out of"):
        open_stored(tmp_path / "run")
