"""The power law of a run that was started, from its folder."""

from __future__ import annotations

from pathlib import Path

from resilin.config import UserError, load_settings
from resilin.models.decoder_settings import DecoderSettings
from resilin.planner.family import Architecture
from resilin.planner.power_law import PowerLaw, fit_power_law, log_uniform, middle
from resilin.run.events import StepDone
from resilin.run.history import read_events
from resilin.run.settings import RunSettings


def read_steps(path: Path) -> list[StepDone]:
    """The committed steps of a run folder's log, in order; a step logged twice (after a resume) counts once.

    Raises:
        UserError: where there is no log, or a line of it cannot be read.
    """
    return [event for event in read_events(path) if isinstance(event, StepDone)]


def plateau(steps: list[StepDone]) -> tuple[int, float | None]:
    """Steps of warm-up, and the step from which the learning rate falls (None: it never does)."""
    peak = max(event.lr for event in steps)
    at_peak = [event.step for event in steps if event.lr > peak * (1 - 1e-6)]
    falls = [event.step for event in steps if event.step > at_peak[-1]]
    return at_peak[0] - 1, float(at_peak[-1]) if falls else None


def run_law(path: Path, floor: bool = False) -> tuple[float, PowerLaw]:
    """P of the run's model, and the law of its online loss over *tokens*.

    Fitted is the part of the run at the peak learning rate, after warm-up and the first 5 %.

    Args:
        path: a run's folder.
        floor: whether to fit an irreducible part.

    Raises:
        UserError: no log there, another kind of model, or too few steps.
    """
    steps = read_steps(path)
    settings = load_settings(RunSettings, path / "settings.toml")
    if not isinstance(settings.model, DecoderSettings):
        raise UserError(f"{path}: laws are compared between decoders; its model is a {type(settings.model).__name__}")
    if len(steps) < 20:
        raise UserError(f"{path}: {len(steps)} steps are too few for a power law: let it train longer")
    warmup, decay_from = plateau(steps)
    times, losses = middle(
        [event.step for event in steps], [event.loss for event in steps], settings.train.steps, warmup, decay_from
    )
    if len(times) < 10:
        raise UserError(
            f"{path}: {len(times)} steps at the peak learning rate are too few for a power law, which holds where "
            "the rate is constant: use a constant or warmup-stable-decay schedule, or train longer"
        )
    tokens = steps[-1].units
    times, losses = log_uniform([time * tokens for time in times], losses)
    return float(Architecture.of(settings.model).parameters), fit_power_law(times, losses, floor)
