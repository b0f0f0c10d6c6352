"""Runs and their folder: one at a time, and a save that fails is told."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from resilin.checkpoint.errors import CheckpointError
from resilin.checkpoint.folder import CheckpointFolder
from resilin.config import parse_settings
from resilin.run.events import Failure
from resilin.run.history import read_events
from resilin.run.settings import RunSettings
from resilin.run.start import start_run

SETTINGS = {
    "source": {"sequence_length": 16, "held_out": {"fraction": 0.0}, "tokenizer": {"kind": "bpe", "vocab_size": 260}},
    "model": {"hidden_size": 8, "layers": 1, "heads": 1, "kv_heads": 1, "mlp_size": 8, "max_positions": 16},
    "train": {"steps": 4, "batch_size": 2, "device": "cpu", "threads": 1},
    "precision": {"compute": "fp32"},
    "evaluation": {"every": 0},
    "checkpoint": {"every": 2},
    "log": {"tensorboard": False, "live": False},
}


@pytest.fixture
def settings(tmp_path: Path) -> RunSettings:
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(f"To be, or not to be, that is question number {number}." for number in range(300)))
    source = {**SETTINGS["source"], "paths": [str(text)], "cache": str(tmp_path / "cache")}
    return parse_settings(RunSettings, {**SETTINGS, "source": source}, "test")


def test_two_processes_cannot_train_in_one_folder(settings: RunSettings, tmp_path: Path) -> None:
    at = tmp_path / "run"
    start_run(settings, at)
    ready, go = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        CheckpointFolder(at / "checkpoints").lock()
        os.write(ready[1], b".")
        os.read(go[0], 1)
        os._exit(0)
    os.read(ready[0], 1)
    log = (at / "events.jsonl").read_bytes()
    with pytest.raises(CheckpointError, match=rf"another process \(process {child} on"):
        start_run(settings, at, resume=True)
    assert (at / "events.jsonl").read_bytes() == log
    os.write(go[1], b".")
    os.waitpid(child, 0)
    start_run(settings, at, resume=True)
    for handle in (*ready, *go):
        os.close(handle)


def test_a_disk_that_fills_up_is_told_and_the_run_goes_on_from_what_was_saved(
    settings: RunSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    at = tmp_path / "run"
    mkdir = os.mkdir

    def full(path: Any, *rest: Any, **options: Any) -> None:
        if ".saving-step-00000004" in str(path):
            raise OSError(errno.ENOSPC, "No space left on device")
        mkdir(path, *rest, **options)

    with monkeypatch.context() as patch:
        patch.setattr(os, "mkdir", full)
        with pytest.raises(CheckpointError, match=r"disk is full: .* the checkpoint of step 2 is still good"):
            start_run(settings, at)
    (failure,) = [event for event in read_events(at) if isinstance(event, Failure)]
    assert (failure.kind, failure.step) == ("save", 4)
    run, outcome = start_run(settings, at, resume=True)
    assert (outcome.reason, run.step) == ("completed", 4)
    assert [event.event for event in read_events(at) if event.event != "failure"] == [
        "start", "step", "step", "save", "start", "step", "step", "save", "end",
    ]  # fmt: skip
