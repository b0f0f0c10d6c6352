"""Runs in stretches: each in a layout of its own, by workers of its own, from the checkpoint of the one before.

Every stretch is `resilin train --resume` as a user starts it: real processes, which find each other, read their parts
of the checkpoint, and end. A mistake can be made on purpose: to leave the optimizer's state behind.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field

from resilin.checkpoint.folder import CheckpointFolder
from resilin.config import Settings, UserError, settings_to_toml
from resilin.models.decoder_settings import DecoderSettings
from resilin.run.events import Listener
from resilin.run.folder import RunFolder
from resilin.run.run import Outcome, Run
from resilin.run.settings import RunSettings
from resilin.run.start import start_run


class Stretch(Settings):
    """Some steps in one layout."""

    until: Annotated[int, Field(gt=0)]
    """The step it ends with."""
    parallel: dict[str, Any] = Field(default={})
    """Of the run, `workers` among them; empty: one process."""
    forget: bool = False
    """Whether the optimizer's state is lost before it."""


class StretchedDecoder(DecoderSettings):
    """A decoder, and the layouts of the run that trains it."""

    stretches: tuple[Stretch, ...] = ()
    """In order; none: one process from the first step to the last."""


def forget_moments(folder: Path) -> None:
    """Take the optimizer's state out of a run's newest checkpoint, as if only weights had been saved.

    Raises:
        UserError: there is no checkpoint.
    """
    store = CheckpointFolder(folder)
    step = store.latest()
    if step is None:
        raise UserError(f"{folder}: holds no checkpoint whose optimizer state could be left out")
    state = store.load(step)
    for moments in state["optimizer"]["parameters"].values():
        for name, tensor in moments.items():
            moments[name] = torch.zeros_like(tensor)
    store.save(step, state)
    store.close()


def train_in_stretches(settings: RunSettings, path: Path, listeners: tuple[Listener, ...]) -> tuple[Run, Outcome]:
    """A recipe's runner: the stretches one after the other, then the end state in this process, evaluated.

    Args:
        settings: whose model is a `StretchedDecoder`.
        path: the run's folder.
        listeners: of the part in this process.

    Raises:
        UserError: a stretch failed; the text has the end of what it said.
    """
    model = settings.model
    stretches = model.stretches if isinstance(model, StretchedDecoder) else ()
    log = path.parent / f"{path.name}-stretches.log"
    for stretch in stretches:
        done = CheckpointFolder(RunFolder(path).checkpoints).latest() if RunFolder(path).holds_run() else None
        if done is not None and done >= stretch.until:
            continue
        if stretch.forget:
            forget_moments(RunFolder(path).checkpoints)
        _in_workers(_settings_of(settings, stretch), path, log)
    if stretches:
        train = settings.train.model_copy(update={"steps": stretches[-1].until})
        settings = settings.model_copy(update={"train": train})
    return start_run(settings, path, resume=True, accept_changes=True, extra_listeners=listeners)


def _settings_of(settings: RunSettings, stretch: Stretch) -> RunSettings:
    train = settings.train.model_copy(update={"steps": stretch.until})
    parallel = type(settings.parallel).model_validate({**settings.parallel.model_dump(), **stretch.parallel})
    return settings.model_copy(update={"train": train, "parallel": parallel})


def _in_workers(settings: RunSettings, path: Path, log: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    file = path.parent / f"{path.name}-stretch.toml"
    file.write_text(settings_to_toml(settings), encoding="utf-8")
    command = [sys.executable, "-m", "resilin", "train", str(file), "--folder", str(path), "--resume"]
    with log.open("ab") as out:
        code = subprocess.call([*command, "--accept-changes"], stdout=out, stderr=subprocess.STDOUT)
    if code:
        said = log.read_text(encoding="utf-8", errors="replace")[-2000:]
        raise UserError(f"{path}: the stretch until step {settings.train.steps} ended with exit code {code}:\n{said}")
