"""Runs that lose workers: real processes, killed where the settings say, or replicas played in one process."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

from resilin.checkpoint.folder import CheckpointFolder
from resilin.cluster.local import worker_command
from resilin.config import UserError
from resilin.recipes.elaswave.replicas import Replicas
from resilin.run.blows import Blow
from resilin.run.chaos import run_told
from resilin.run.chaos_report import Told
from resilin.run.events import Evaluated, Listener
from resilin.run.folder import RunFolder
from resilin.run.jsonl_log import JsonlLog
from resilin.run.run import Outcome, Run
from resilin.run.settings import RunSettings
from resilin.run.start import start_run

STEP_SECONDS = 0.05
"""A kill falls anywhere in so long a time after the step it follows: before, in or after an exchange."""


def blows_of(objective: Replicas, seed: int) -> list[Blow]:
    """The kills that the settings name, each at a moment of its own within a step."""
    draw, left, found = random.Random(seed), list(range(objective.replicas)), []
    for step, replica in objective.lost:
        place = left.index(replica)
        found.append(Blow(step, draw.uniform(0, STEP_SECONDS), "kill", (place + 0.5) / len(left)))
        left.remove(replica)
    return found


def train_with_losses(settings: RunSettings, path: Path, listeners: tuple[Listener, ...]) -> tuple[Run, Outcome]:
    """A recipe's runner. Of real processes, the end state is opened in this one afterwards.

    Args:
        settings: whose objective may be `Replicas`.
        path: the run's folder.
        listeners: of the part in this process.

    Raises:
        UserError: the workers did not get to the end, or a kill did not happen.
    """
    objective = settings.objective
    if not (isinstance(objective, Replicas) and objective.processes and objective.lost):
        return start_run(settings, path, resume=True, extra_listeners=listeners)
    folder = RunFolder(path)
    there = CheckpointFolder(folder.checkpoints).latest() if folder.holds_run() else None
    if there != settings.train.steps:
        shutil.rmtree(path, ignore_errors=True)  # an earlier one was interrupted: its kills have to happen again
        told = run_told(_elastic(settings, objective), path, worker_command(), blows_of(objective, settings.seed))
        _note(folder, settings, objective, told)
    return start_run(settings, path, resume=True, accept_changes=True, extra_listeners=listeners)


def _elastic(settings: RunSettings, objective: Replicas) -> RunSettings:
    return settings.model_copy(
        update={
            "parallel": settings.parallel.model_copy(update={"workers": objective.replicas}),
            "cluster": settings.cluster.model_copy(update={"elastic": True}),
        }
    )


def _note(folder: RunFolder, settings: RunSettings, objective: Replicas, told: Told) -> None:
    """Add what happened to the workers to the run's log, as one more evaluation of its last step."""
    if told.ended:
        raise UserError(f"{folder.path}: {told.ended}")
    killed, changes = [fell for fell in told.blows if fell.what == "kill"], told.changes[1:]
    if len(killed) != len(objective.lost) or len(changes) < len(killed):
        raise UserError(
            f"{folder.path}: {len(objective.lost)} workers were to be killed; {len(killed)} were, and {len(changes)} "
            "changes followed"
        )
    after = [min((t for t in told.times if t > fell.time), default=fell.time) - fell.time for fell in told.blows]
    facts = {
        "killed": float(len(killed)),
        "members": float(len(changes[-1]["members"]) if changes else objective.replicas),
        "redone": float(sum(change["redone"] for change in changes)),
        "kept": float(sum(change["kept"] for change in changes)),
        "recovery": max(after, default=0.0),
    }
    with JsonlLog(folder.events_file) as log:
        log(Evaluated(step=settings.train.steps, name="cluster", metrics=facts, seconds=0.0))
