"""What happens during a run, as values that listeners receive: a log, a progress bar, a plot, a tracker.

Steps are counted in *committed* steps: `StepDone(step=1)` is the first, and a checkpoint of step 100 holds the
result of the first 100. In JSON a number that JSON cannot hold is the string "nan", "inf" or "-inf"; `from_json`
turns it back wherever the field is a number.
"""

from __future__ import annotations

import math
import time
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from functools import cache
from typing import Any, ClassVar

_NON_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


@dataclass(frozen=True, kw_only=True)
class Event:
    """Something that happened; a subclass of your own works with every listener that writes JSON.

    Attributes:
        time: wall clock when it happened, seconds since 1970.
    """

    event: ClassVar[str]
    """The name in the log; stable across versions."""

    time: float = field(default_factory=time.time)


@dataclass(frozen=True, kw_only=True)
class RunStarted(Event):
    """A run begins, or goes on after a resume.

    Attributes:
        folder: the run folder.
        settings: the complete resolved settings, as a JSON tree.
        parameters: how many numbers the model has.
        device: where it runs, in words ("cpu, 2 threads").
        start_step: steps committed before (0 for a fresh run).
        total_steps: steps after which the run is complete.
        unit: what throughput counts: the objective's units in the plural ("tokens", "images").
        flops_per_unit: of forward and backward together; None where nobody knows.
        peak_flops: matrix-multiply peak measured at start, FLOP/s; None where it was not measured.
    """

    event: ClassVar[str] = "start"

    folder: str
    settings: Mapping[str, Any]
    parameters: int
    device: str
    start_step: int
    total_steps: int
    unit: str = "tokens"
    flops_per_unit: float | None = None
    peak_flops: float | None = None


@dataclass(frozen=True, kw_only=True)
class StepDone(Event):
    """A committed step.

    Attributes:
        step: steps committed so far, this one included.
        loss: mean over the step's valid units.
        lr: learning rate of the first parameter group.
        grad_norm: global norm before clipping.
        units: valid units in the step.
        seconds: wall time since the previous step was done, evaluation and saving left out.
        mfu: share of the measured peak in [0, 1]; None where the peak or the model's FLOPs are unknown.
        logs: what the objective, optimizer and transforms say of the step.
    """

    event: ClassVar[str] = "step"

    step: int
    loss: float
    lr: float
    grad_norm: float
    units: int
    seconds: float
    mfu: float | None = None
    logs: Mapping[str, float] = field(default_factory=dict)

    @property
    def units_per_second(self) -> float:
        """Throughput; 0 where no time was measured."""
        return self.units / self.seconds if self.seconds > 0 else 0.0


@dataclass(frozen=True, kw_only=True)
class Evaluated(Event):
    """An evaluation.

    Attributes:
        step: steps committed before it.
        name: of the evaluation ("validation").
        metrics: its numbers by name.
        seconds: how long it took.
    """

    event: ClassVar[str] = "eval"

    step: int
    name: str
    metrics: Mapping[str, float]
    seconds: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Staged(Event):
    """All of a state is copied, and is being written in the background; `Saved` says when it is safe.

    Attributes:
        step: steps committed in it.
        seconds: how long the run waited: for the save before it where that was still under way, for what was copied at
            once, and before the next update for what was left of the rest.
    """

    event: ClassVar[str] = "stage"

    step: int
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Saved(Event):
    """A checkpoint is complete on disk.

    Attributes:
        step: steps committed in it.
        path: its folder, or URL.
        bytes: its size.
        seconds: how long writing took; where it was `Staged` before, the run did not wait for it.
        pruned: older steps whose checkpoints were removed afterwards.
    """

    event: ClassVar[str] = "save"

    step: int
    path: str
    bytes: int
    seconds: float
    pruned: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Failure(Event):
    """Something went wrong.

    Attributes:
        step: steps committed before it: the failed one is not among them.
        kind: "non_finite" for a loss or gradient that is not a number, "before_step" for a part that failed before a
            step was computed, "save" for a checkpoint, or another word.
        message: for the user.
        slots: the samples at fault, where known.
        action: "stop", or "skip" where the run goes on without the step.
    """

    event: ClassVar[str] = "failure"

    step: int
    kind: str
    message: str
    slots: tuple[int, ...] = ()
    action: str = "stop"


@dataclass(frozen=True, kw_only=True)
class Interrupted(Event):
    """The user or the scheduler asked the run to end: it finishes its step and saves.

    Attributes:
        step: steps committed when the wish was seen.
        signal: its name ("SIGINT").
    """

    event: ClassVar[str] = "interrupt"

    step: int
    signal: str = "SIGINT"


@dataclass(frozen=True, kw_only=True)
class RunEnded(Event):
    """Nothing more will happen.

    Attributes:
        step: steps committed.
        reason: "completed", "interrupted" or "failed".
        seconds: of this run since its start or resume.
    """

    event: ClassVar[str] = "end"

    step: int
    reason: str
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Cluster(Event):
    """Something was decided about the workers of an elastic run.

    Attributes:
        what: "lost", "leaving", "change", "digest" or "end".
        facts: which workers, why, and what it took, as JSON values; seconds where times are meant.
    """

    event: ClassVar[str] = "cluster"

    what: str
    facts: Mapping[str, Any]


Listener = Callable[[Event], None]
"""Receives every event in order, in the process that trains; slow work belongs elsewhere."""

KINDS: tuple[type[Event], ...] = (
    RunStarted,
    StepDone,
    Evaluated,
    Staged,
    Saved,
    Failure,
    Interrupted,
    RunEnded,
    Cluster,
)
"""The events Resilin itself raises."""


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        if math.isfinite(value):
            return float(value)
        return "nan" if math.isnan(value) else "inf" if value > 0 else "-inf"
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


def to_json(event: Event) -> dict[str, Any]:
    """The event as a strict JSON tree: `event`, `time` and its fields; NaN and infinities as strings."""
    values = {item.name: _plain(getattr(event, item.name)) for item in fields(event)}
    return {"event": event.event, **values}


@dataclass(frozen=True)
class _Fields:
    """Which fields of an event need more than what JSON gives."""

    names: frozenset[str]
    numbers: tuple[str, ...]
    tables: tuple[str, ...]
    tuples: tuple[str, ...]


@cache  # reading a long log asks for the same few classes a million times
def _fields(kind: Any) -> _Fields:
    every = typing.get_type_hints(kind)
    hints = {item.name: every[item.name] for item in fields(kind)}
    return _Fields(
        names=frozenset(hints),
        numbers=tuple(n for n, hint in hints.items() if hint is float or float in typing.get_args(hint)[:1]),
        tables=tuple(n for n, hint in hints.items() if typing.get_args(hint) == (str, float)),
        tuples=tuple(n for n, hint in hints.items() if typing.get_origin(hint) is tuple),
    )


def _number(value: Any) -> Any:
    return _NON_FINITE.get(value, value) if isinstance(value, str) else value


def from_json(record: Mapping[str, Any], kinds: tuple[type[Event], ...] = KINDS) -> Event:
    """The event that `to_json` wrote.

    Args:
        record: one JSON object of a log.
        kinds: the event classes that may appear; add your own to read them back.

    Raises:
        ValueError: for an event of another name, or with fields that are missing or unknown.
    """
    name = record.get("event")
    found = next((kind for kind in kinds if kind.event == name), None)
    if found is None:
        known = ", ".join(kind.event for kind in kinds)
        raise ValueError(f"event {name!r} is unknown here (known: {known}); was it written by a newer version?")
    known_fields = _fields(found)  # type: ignore[arg-type]  # a class is hashable, whatever its instances are
    values = {key: value for key, value in record.items() if key != "event"}
    unknown = values.keys() - known_fields.names
    if unknown:
        raise ValueError(f"event {name!r} has an unknown field {min(unknown)!r}; was it written by a newer version?")
    try:
        for key in known_fields.numbers:
            if isinstance(values.get(key), str):
                values[key] = _number(values[key])
        for key in known_fields.tables:
            if key in values:
                values[key] = {inner: _number(item) for inner, item in values[key].items()}
        for key in known_fields.tuples:
            if key in values:
                values[key] = tuple(values[key])
        return found(**values)
    except (TypeError, AttributeError) as error:
        raise ValueError(f"event {name!r} cannot be read: {error}") from None
