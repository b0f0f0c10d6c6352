"""`resilin checkpoint`, as a user types it; what a user breaks by hand is told by file and tensor."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

from resilin.checkpoint.folder import CheckpointFolder
from resilin.cli.checkpoint import app


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = CheckpointFolder(tmp_path / "run" / "checkpoints", second_copy=True)
    for step in (100, 200, 300):
        weight = torch.arange(50.0).reshape(10, 5) + step
        folder.save(
            step, {"model": {"w": weight, "tied": weight}, "optimizer": {"m": weight * 2}, "run": {"step": step}}
        )
    folder.close()
    return tmp_path / "run"


def checkpoint(*arguments: object) -> Result:
    return CliRunner().invoke(app, list(map(str, arguments)), env={"COLUMNS": "160"})


def test_inspect_tells_parts_and_tensors(run: Path) -> None:
    shown = checkpoint("inspect", run, "--tensors")
    assert shown.exit_code == 0, shown.output
    for words in ("300", "2 files", "model/w", "F32 [10, 5], the same as model/tied", "run/step"):
        assert words in shown.output
    assert "step-00000100" in checkpoint("inspect", run, "--step", 100).output


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-4] ^= 1
    file.write_bytes(data)


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "a flipped bit": (lambda at: flip(at / "model.safetensors"), "model.safetensors: the checksum of tensor 'w'"),
    "a cut file": (lambda at: (at / "model.safetensors").write_bytes(b"x" * 90), "model.safetensors: has 90 bytes"),
    "a missing file": (
        lambda at: (at / "optimizer.safetensors").unlink(),
        "optimizer.safetensors: the file is missing",
    ),
    "a damaged index": (lambda at: flip(at / "index.json"), "index.json: "),
    "a damaged second index": (lambda at: flip(at / "index.copy.json"), "index.copy.json: "),
    "no index": (lambda at: (at / "index.json").unlink(), "has no index.json: not a checkpoint, or one that was never"),
    "an index of another run": (
        lambda at: (at / "index.json").write_bytes((at.parent / "step-00000100" / "index.json").read_bytes()),
        "model.safetensors: the checksum of tensor 'w'",
    ),
}


@pytest.mark.filterwarnings("ignore:.*its second copy, index.copy.json, is good and was taken")
@pytest.mark.parametrize("how", BROKEN)
def test_verify_finds_each_damage_and_names_it(run: Path, how: str) -> None:
    assert checkpoint("verify", run).output.endswith("every checksum agrees\n")
    at = run / "checkpoints" / "step-00000300"
    change, words = BROKEN[how]
    change(at)
    for arguments in ((at.parent, "--step", 300), (run, "--all"), (run,)):
        found = checkpoint("verify", *arguments)
        assert found.exit_code == 1, found.output
        assert words in found.output.replace("\n", "")


def test_verify_names_every_damage_not_only_the_first(run: Path) -> None:
    at = run / "checkpoints" / "step-00000300"
    flip(at / "model.safetensors")
    (at / "optimizer.safetensors").unlink()
    found = checkpoint("verify", run, "--step", 300)
    assert "2 damaged" in found.output


def test_diff_tells_where_and_by_how_much(run: Path) -> None:
    first, second = (run / "checkpoints" / f"step-00000{step}" for step in (100, 200))
    found = checkpoint("diff", first, second)
    assert found.exit_code == 1
    assert (
        "model/w [10, 5]: 50 of 50 elements differ, the first at [0, 0]; most at [0, 0], by 100: 100.0 and 200.0"
        in (found.output)
    )
    assert "run/step: 100 and 200" in found.output
    assert "optimizer" not in checkpoint("diff", first, second, "--part", "model").output
    same = checkpoint("diff", first, first)
    assert (same.exit_code, same.output) == (0, "no difference\n")


def test_prune_removes_what_is_not_kept_and_never_the_last_good_one(run: Path) -> None:
    assert checkpoint("prune", run, "--keep-last", 1, "--dry-run").output == "would remove: 100, 200\n"
    (run / "checkpoints" / "step-00000300" / "model.safetensors").unlink()
    assert checkpoint("prune", run, "--keep-last", 1).output == "removed: 100\n"
    assert CheckpointFolder(run / "checkpoints").steps() == [200]
    assert checkpoint("prune", run, "--keep-last", 1, "--keep-every", 100).output == "removed: none\n"


def test_consolidate_writes_a_checkpoint_that_verifies(run: Path, tmp_path: Path) -> None:
    done = checkpoint("consolidate", run, tmp_path / "whole", "--step", 100)
    assert done.exit_code == 0, done.output
    assert checkpoint("verify", tmp_path / "whole").exit_code == 0
    assert checkpoint("diff", run / "checkpoints" / "step-00000100", tmp_path / "whole").exit_code == 0


def test_a_url_works_as_a_folder_does() -> None:
    CheckpointFolder("memory://cli/run").save(1, {"m": {"w": torch.ones(2)}})
    assert checkpoint("verify", "memory://cli/run").output == "memory://cli/run/step-00000001: every checksum agrees\n"
    assert checkpoint("inspect", "memory://cli/run").exit_code == 0


def test_a_warning_is_one_line_without_the_place_in_our_code(run: Path) -> None:
    (run / "checkpoints" / "step-00000300" / "optimizer.safetensors").unlink()
    command = [sys.executable, "-m", "resilin", "checkpoint", "inspect", str(run)]
    said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stderr
    assert said.startswith("warning: the checkpoint of step 300 is passed over: ")
    assert "UserWarning" not in said
    assert len(said.splitlines()) == 1
