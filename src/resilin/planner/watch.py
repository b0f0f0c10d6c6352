"""The monitor over a run's folder: one that is going on, or one that has ended."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from resilin.config import UserError, load_settings
from resilin.planner.monitor import Monitor
from resilin.run.history import read_events
from resilin.run.settings import RunSettings


def plateau_of(settings: RunSettings) -> tuple[int, float | None]:
    """Steps of warm-up, and the step from which the learning rate falls (None: it never does).

    Both from the optimizer's schedule; an optimizer without one is taken to have a constant rate.
    """
    schedule = getattr(settings.optimizer, "schedule", None)
    total = settings.train.steps
    if schedule is None:
        return 0, None
    factors = [float(schedule.factor(step, total)) for step in range(total)]
    peak = max(factors)
    at_peak = [step for step, factor in enumerate(factors) if factor > peak * (1 - 1e-9)]
    return at_peak[0], float(at_peak[-1] + 1) if at_peak[-1] < total - 1 else None


def steps_per_epoch(settings: RunSettings) -> float | None:
    """Steps after which the data repeat; None for a source that cannot say."""
    from resilin.data.settings import SourceContext

    source: Any = settings.source.build(SourceContext(settings.seed, "train", settings.train.batch_size))
    rows = getattr(getattr(source, "order", None), "epoch_length", None)
    return None if rows is None else rows / settings.train.batch_size


def monitor_of(settings: RunSettings, tell: Callable[[str], None] | None = None, floor: bool = False) -> Monitor:
    """A monitor that knows a run's length, warm-up, decay and epoch; a listener for `start_run(extra_listeners=...)`.

    Args:
        settings: of the run.
        tell: receives a line for each reading and finding.
        floor: whether the law has an irreducible part.
    """
    warmup, decay_from = plateau_of(settings)
    return Monitor(settings.train.steps, steps_per_epoch(settings), warmup, decay_from, floor, tell)


def watch_run(path: Path, tell: Callable[[str], None], floor: bool = False) -> Monitor:
    """The monitor after all that a run has logged so far.

    Args:
        path: the run's folder.
        tell: receives a line for each reading and finding.
        floor: whether the law has an irreducible part.

    Raises:
        UserError: where no run was started.
    """
    if not (path / "settings.toml").is_file():
        raise UserError(f"{path}: no run was started here (it has no settings.toml)")
    monitor = monitor_of(load_settings(RunSettings, path / "settings.toml"), tell, floor)
    for event in read_events(path):
        monitor(event)
    return monitor
