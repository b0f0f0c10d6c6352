"""Runs and their folder: one at a time, and a save that fails is told."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from resilin.checkpoint.errors import CheckpointError
from resilin.checkpoint.folder import CheckpointFolder
from resilin.checkpoint.inspect import find_checkpoint
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
    told = [event.event for event in read_events(at) if event.event not in ("failure", "stage")]
    assert told == ["start", "step", "step", "save", "start", "step", "step", "save", "end"]


@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_save_in_the_background_is_told_when_it_is_safe(
    settings: RunSettings, tmp_path: Path, asynchronous: bool
) -> None:
    checkpoint = settings.checkpoint.model_copy(update={"asynchronous": asynchronous})
    seen: list[tuple[str, int]] = []

    def listen(event: Any) -> None:
        if event.event in ("stage", "save"):
            seen.append((event.event, event.step))
        if event.event == "save":
            assert event.step in CheckpointFolder(tmp_path / "run" / "checkpoints").steps()
        if event.event == "end":  # nothing is under way any more
            assert CheckpointFolder(tmp_path / "run" / "checkpoints").latest() == 4

    start_run(settings.model_copy(update={"checkpoint": checkpoint}), tmp_path / "run", extra_listeners=(listen,))
    assert [pair for pair in seen if pair[0] == "save"] == [("save", 2), ("save", 4)]
    assert [pair for pair in seen if pair[0] == "stage"] == ([("stage", 2), ("stage", 4)] if asynchronous else [])


def test_checkpoints_may_be_kept_elsewhere_and_a_resumed_run_finds_them(settings: RunSettings, tmp_path: Path) -> None:
    elsewhere = settings.checkpoint.model_copy(update={"path": "memory://a-bucket/run"})
    there = settings.model_copy(update={"checkpoint": elsewhere})
    start_run(there, tmp_path / "run")
    assert CheckpointFolder("memory://a-bucket/run").steps() == [2, 4]
    assert CheckpointFolder(tmp_path / "run" / "checkpoints").steps() == []
    assert find_checkpoint(tmp_path / "run") == "memory://a-bucket/run/step-00000004"
    longer = there.model_copy(update={"train": there.train.model_copy(update={"steps": 6})})
    run, _ = start_run(longer, tmp_path / "run", resume=True, accept_changes=True)
    assert run.started is not None
    assert CheckpointFolder("memory://a-bucket/run").latest() == run.step == 6
    back = longer.model_copy(update={"checkpoint": settings.checkpoint})  # the place is changed: the old one is read
    steps: list[int] = []
    run, _ = start_run(
        back, tmp_path / "run", resume=True, extra_listeners=(lambda event: steps.append(getattr(event, "step", 6)),)
    )
    assert min(steps) == 6
    assert CheckpointFolder(tmp_path / "run" / "checkpoints").steps() == [6]


def test_a_checkpoint_of_another_model_is_refused_by_tensor_and_nothing_is_lost(
    settings: RunSettings, tmp_path: Path
) -> None:
    start_run(settings, tmp_path / "run")
    before = CheckpointFolder(tmp_path / "run" / "checkpoints").load(4)
    wide = settings.model_copy(update={"model": settings.model.model_copy(update={"hidden_size": 16})})
    words = (
        r"step-00000004: does not fit this run: tensor '.*' was saved with shape \[260, 8\].*model's has \[260, 16\]"
    )
    with pytest.raises(CheckpointError, match=words):
        start_run(wide, tmp_path / "run", resume=True, accept_changes=True)
    deep = settings.model_copy(update={"model": settings.model.model_copy(update={"layers": 2})})
    with pytest.raises(CheckpointError, match=r"does not fit this run: the model has '.*', which was not saved"):
        start_run(deep, tmp_path / "run", resume=True, accept_changes=True)
    after = CheckpointFolder(tmp_path / "run" / "checkpoints").load(4)
    assert all(torch.equal(after["model"][name], tensor) for name, tensor in before["model"].items())
