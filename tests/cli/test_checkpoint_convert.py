"""`resilin checkpoint convert` on a real run."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any


def test_a_run_that_went_through_dcp_is_the_same_and_goes_on(resilin: Any, finished_run: Path, workplace: Path) -> None:
    told = resilin("checkpoint", "convert", str(finished_run), "as-dcp", "--to", "dcp")
    assert told.returncode == 0, told.stderr
    assert "Resilin checkpoint -> as-dcp: dcp" in " ".join(told.stdout.split())
    back = resilin("checkpoint", "convert", "as-dcp", "back")
    assert back.returncode == 0, back.stderr
    same = resilin("checkpoint", "diff", "back", str(finished_run))
    assert (same.returncode, same.stdout.strip()) == (0, "no difference"), same.stdout

    longer = workplace / "runs" / "longer"
    shutil.copytree(finished_run, longer)
    shutil.rmtree(longer / "checkpoints")
    shutil.copytree(workplace / "back", longer / "checkpoints")
    more = ("train.steps=9", "--resume", "--accept-changes")
    gone_on = resilin("train", "run.toml", "--folder", "runs/longer", *more)
    assert gone_on.returncode == 0, gone_on.stderr
    shutil.copytree(finished_run, workplace / "runs" / "control")
    control = resilin("train", "run.toml", "--folder", "runs/control", *more)
    assert control.returncode == 0, control.stderr
    same = resilin("checkpoint", "diff", "runs/longer", "runs/control")
    assert (same.returncode, same.stdout.strip()) == (0, "no difference"), same.stdout


def test_what_cannot_be_carried_is_an_error_that_says_what_to_do(resilin: Any, finished_run: Path) -> None:
    done = resilin("checkpoint", "convert", str(finished_run), "as-hf", "--to", "huggingface")
    assert done.returncode == 2
    assert "`resilin export` writes it" in done.stderr
    done = resilin("checkpoint", "convert", str(finished_run), "as-universal", "--to", "universal", "--weights-only")
    assert done.returncode == 2
    assert "no parameter groups" in done.stderr
    done = resilin("checkpoint", "convert", str(finished_run), "out", "--tie", "head.weight")
    assert done.returncode == 2
    assert "expected NAME=OTHER" in done.stderr
