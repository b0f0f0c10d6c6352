"""Starting or continuing a run in its folder, with the listeners its settings ask for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch

from resilin import __version__
from resilin.checkpoint.errors import CheckpointError
from resilin.checkpoint.folder import CheckpointFolder
from resilin.cluster.join import agree_on, joined, lead_first
from resilin.cluster.position import Position
from resilin.parallel import activity
from resilin.parallel.messages import tell_all
from resilin.parallel.world import World
from resilin.precision.autocast import choose_precision
from resilin.run.build import build_run
from resilin.run.device import choose_device, set_threads
from resilin.run.divided import load_divided
from resilin.run.events import Listener
from resilin.run.folder import RunFolder
from resilin.run.jsonl_log import JsonlLog
from resilin.run.live_view import LiveView
from resilin.run.run import Outcome, Run
from resilin.run.settings import RunSettings


def listeners_of(settings: RunSettings, folder: RunFolder, step: int) -> list[Any]:
    """The event log, and whatever `[log]` switches on; each is a context manager and a listener."""
    log = settings.log
    listeners: list[Any] = [JsonlLog(folder.events_file)]
    if log.tensorboard:
        from resilin.run.tensorboard_log import TensorBoardLog

        listeners.append(TensorBoardLog(folder.tensorboard, purge_step=step))
    if log.tracker != "none":
        from resilin.run.tracker_log import tracker_log

        listeners.append(tracker_log(log.tracker, project=log.project, name=settings.name))
    if log.live:
        listeners.append(LiveView())
    return listeners


def settle(settings: RunSettings, folder: RunFolder, *, resume: bool) -> RunSettings:
    """The settings with every `auto` decided: by measurement for a new run, as before for one that goes on.

    A resumed run that measured anew might compute in another precision, and no longer give the same bits.
    """
    device = choose_device(settings.train.device)
    set_threads(settings.train.threads)
    compute: str = settings.precision.compute
    if compute == "auto" and resume and folder.holds_run():
        before = folder.settings()
        compute = before.precision.compute if before.train.device == device.type else "auto"
    if compute == "auto":
        compute = choose_precision(settings.precision, device).compute
    precision = settings.precision.model_copy(update={"compute": compute})
    train = settings.train.model_copy(update={"device": device.type})
    return settings.model_copy(update={"precision": precision, "train": train})


def resume_from_latest(run: Run, store: CheckpointFolder) -> bool:
    """Load the newest checkpoint into the run; False where there is none.

    Raises:
        CheckpointError: naming the checkpoint and what of it is damaged or does not fit this run.
    """
    step = store.latest()
    if step is None:
        return False
    # Mapped: what is taken over is copied, and is in memory once only.
    state = store.load(step, mapped=True) if run.layout is None else load_divided(run, store, step)
    try:
        run.load_state_dict(state)
    except (CheckpointError, ValueError) as error:
        raise CheckpointError(f"{store.step_path(step)}: does not fit this run: {error}") from error
    return True


def make_it_a_run(folder: RunFolder, settings: RunSettings, run: Run) -> None:
    """Write what others need to open the folder: the settings, and the tokenizer where there is one."""
    folder.store(settings)
    tokenizer = getattr(run.source, "tokenizer", None)
    if tokenizer is not None:
        tokenizer.save(folder.tokenizer)


def start_run(
    settings: RunSettings,
    path: Path,
    *,
    resume: bool = False,
    accept_changes: bool = False,
    extra_listeners: tuple[Listener, ...] = (),
    place: Position | None = None,
) -> tuple[Run, Outcome]:
    """Train in a folder until done, interrupted or stopped by a failure.

    Args:
        settings: of the run.
        path: its folder, made if needed.
        resume: continue the run found there (start one where there is none).
        accept_changes: continue although settings that decide what is learned have changed.
        extra_listeners: told of every event beside those of the settings.
        place: which of several workers this process is, all of whom call this; None: there is no other.

    Returns:
        The run as it stands and how it ended.
    """
    folder = RunFolder(path)
    with ExitStack() as stack:
        world = stack.enter_context(workers_of(settings, place))
        lead = world is None or world.rank == 0
        settings = settle(settings, folder, resume=resume)
        if world is not None:
            settings = agreed_settings(settings, world)
        with lead_first(world):
            if lead:
                folder.prepare(settings, resume=resume, accept_changes=accept_changes)
                writer = CheckpointFolder(folder.checkpoints)
                writer.lock()  # now, and not at the first save: until then two runs would share one event log
                stack.callback(writer.close)
        before = folder.checkpoints_of()
        run = build_run(settings, folder, world=world)
        assert run.checkpoints is not None
        stack.callback(run.checkpoints.close)
        if run.saves is not None:
            stack.callback(run.saves.close)
        with lead_first(world):
            if lead:  # not before: a run whose data or model could not be built is none, and may begin anew
                make_it_a_run(folder, settings, run)
        if resume:
            # Settings may name another place than before: then the first checkpoint is still where it was.
            resume_from_latest(run, run.checkpoints) or resume_from_latest(run, CheckpointFolder(before))
        listeners = listeners_of(settings, folder, run.step) if lead else []
        for listener in listeners:
            stack.callback(listener.close)
        run.listeners = (*listeners, *extra_listeners)
        return run, run.train()


@contextmanager
def workers_of(settings: RunSettings, place: Position | None) -> Iterator[World | None]:
    """While entered, this process is connected to the other workers of a run; None where there are none.

    Raises:
        ParallelError: so many workers cannot be divided as the settings say.
    """
    degrees = settings.parallel.degrees(place.workers if place is not None else 1)
    if place is None or place.workers == 1:
        yield None
        return
    with joined(place, choose_device(settings.train.device), settings.parallel.timeout):
        world = World(degrees, place.rank)
        activity.now.place = world.where
        yield world


def agreed_settings(settings: RunSettings, world: World) -> RunSettings:
    """The settings, the same at all workers: what was measured is the first one's.

    Raises:
        ParallelError: what was given to the workers differs.
    """
    compute = tell_all(settings.precision.compute, world.everyone)[0]
    precision = settings.precision.model_copy(update={"compute": compute})
    settings = settings.model_copy(update={"precision": precision})
    versions = {"torch": torch.__version__, "resilin": __version__}
    agree_on("versions", versions, world.everyone)
    agree_on("settings", settings.model_dump(mode="json"), world.everyone)
    return settings
