"""Schedules by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from resilin.parallel.pipeline.errors import ScheduleError
from resilin.parallel.pipeline.generate import gpipe, interleaved, one_f_one_b
from resilin.parallel.pipeline.schedule import Schedule
from resilin.parallel.pipeline.zero_bubble import zb_h1, zb_interleaved, zb_v


@dataclass(frozen=True, slots=True)
class Method:
    """One way to order a pipeline's work.

    Attributes:
        make: from stages, ranks and micro-batches (and the size of a group, where `grouped`).
        chunks: stages a rank it must have; None: any number.
        grouped: takes the size of a group.
        split: cuts the backward in two.
    """

    make: Callable[..., Schedule]
    chunks: int | None = None
    grouped: bool = False
    split: bool = False


METHODS = {
    "gpipe": Method(gpipe),
    "1f1b": Method(one_f_one_b, chunks=1),
    "interleaved": Method(interleaved, grouped=True),
    "zb-h1": Method(zb_h1, chunks=1, split=True),
    "zb-interleaved": Method(zb_interleaved, grouped=True, split=True),
    "zb-v": Method(zb_v, chunks=2, split=True),
}
"""The schedules there are, by the name that settings and commands use."""


def build(name: str, stages: int, ranks: int, micros: int, group: int | None = None) -> Schedule:
    """The schedule of a name; it passes `validate`.

    Args:
        name: one of `METHODS`.
        stages: of the model; a multiple of `ranks`.
        ranks: in the pipeline.
        micros: micro-batches of a batch.
        group: micro-batches that go through one stage of a rank before the next, for interleaved schedules.

    Raises:
        ScheduleError: an unknown name, or numbers that the schedule cannot have.
    """
    method = METHODS.get(name)
    if method is None:
        raise ScheduleError(f"there is no pipeline schedule {name!r}: use one of {', '.join(METHODS)}")
    if micros < 1:
        raise ScheduleError(f"a batch needs at least one micro-batch, not {micros}")
    if ranks < 1 or stages < 1:
        raise ScheduleError(f"a pipeline needs at least one rank and one stage, not {ranks} and {stages}")
    if method.chunks is not None and stages != method.chunks * ranks:
        fits = ", ".join(other for other, m in METHODS.items() if m.chunks in (None, stages / ranks))
        raise ScheduleError(
            f"{name} has {method.chunks} stage{'s' * (method.chunks > 1)} a rank, not {stages} on {ranks}"
            + (f"; with so many: {fits}" if stages % ranks == 0 else f"; {ranks} ranks share a multiple of {ranks}")
        )
    if group is not None and not method.grouped:
        having = ", ".join(other for other, m in METHODS.items() if m.grouped)
        raise ScheduleError(f"{name} has no groups of micro-batches: leave group out, or use one of {having}")
    return method.make(stages, ranks, micros, group) if method.grouped else method.make(stages, ranks, micros)
