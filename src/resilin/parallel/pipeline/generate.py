"""Schedules whose backward is whole: GPipe, 1F1B and interleaved 1F1B."""

from __future__ import annotations

from collections.abc import Sequence

from resilin.parallel.pipeline.errors import ScheduleError
from resilin.parallel.pipeline.schedule import Action, B, F, Schedule, loop


def gpipe(stages: int, ranks: int, micros: int) -> Schedule:
    """All forwards, then all backwards (Huang et al. 2019); with several stages a rank, breadth first.

    Holds the activations of every micro-batch; bubble `(p - 1) / (v m)` of the ideal time for `m >= p`.
    """
    rank_of = loop(stages, ranks)
    rows = []
    for rank in range(ranks):
        own = range(rank, stages, ranks)
        row = [Action(F, stage, micro) for stage in own for micro in range(micros)]
        row += [Action(B, stage, micro) for stage in reversed(own) for micro in range(micros)]
        rows.append(tuple(row))
    return Schedule(tuple(rows), rank_of, micros, "gpipe")


def one_f_one_b(stages: int, ranks: int, micros: int) -> Schedule:
    """One forward, one backward in turns once the pipeline is full (PipeDream-Flush, Narayanan et al. 2021).

    Rank `r` of `p` starts with `p - r - 1` forwards, so it holds `min(m, p - r)` micro-batches; bubble `(p - 1) / m`.

    Raises:
        ScheduleError: more than one stage a rank.
    """
    if stages != ranks:
        raise ScheduleError(f"1f1b has one stage for each rank, not {stages} on {ranks}: take interleaved for more")
    return interleaved(stages, ranks, micros, name="1f1b")


def interleaved(stages: int, ranks: int, micros: int, group: int | None = None, name: str = "interleaved") -> Schedule:
    """1F1B with `v` stages on each rank, dealt round (Narayanan et al. 2021, arXiv 2104.04473, section 2.2).

    Micro-batches go in groups: a rank takes a group through one of its stages, then through its next. Bubble
    `(p - 1) / (v m)` for `m >= p`; with groups of `p` micro-batches the first rank holds
    `1 + (p - 1) / (p v)` times the activations of 1F1B. One stage a rank is 1F1B itself.

    Any number of micro-batches will do. Where the last group would be smaller than `ranks`, whose results would then
    come back too late (or never: the order deadlocks), the micro-batches are shared out over one group less. The bubble
    stays what it is; for each micro-batch that the largest group has more, a rank holds `v - 1` more activations.
    With fewer micro-batches than ranks all forwards come first.

    Args:
        stages: a multiple of `ranks`.
        ranks: in the pipeline.
        micros: micro-batches.
        group: micro-batches of a group, at least `ranks`; larger ones hold more activations and send fewer messages
            at a time. By default `ranks`.
        name: of the schedule.

    Raises:
        ScheduleError: the group is smaller than the pipeline.
    """
    rank_of = loop(stages, ranks)
    chunks = stages // ranks
    sizes = group_sizes(ranks, micros, group)
    order = []  # (chunk, micro), as every rank goes through its forwards
    first = 0
    for size in sizes:
        order += [(chunk, micro) for chunk in range(chunks) for micro in range(first, first + size)]
        first += size
    rows = []
    for rank in range(ranks):
        ahead = 2 * (ranks - rank - 1) + (chunks - 1) * max(sizes) if chunks > 1 else ranks - rank - 1
        # Fewer micro-batches than ranks leave no steady part in which a backward could wait its turn.
        warmup = len(order) if chunks > 1 and micros < ranks else min(ahead, len(order))
        forwards = [Action(F, rank + chunk * ranks, micro) for chunk, micro in order]
        backwards = [Action(B, rank + (chunks - 1 - chunk) * ranks, micro) for chunk, micro in order]
        row = forwards[:warmup]
        for one, back in zip(forwards[warmup:], backwards, strict=False):
            row += (one, back)
        rows.append(tuple(row + backwards[len(order) - warmup :]))
    return Schedule(tuple(rows), rank_of, micros, name)


def group_sizes(ranks: int, micros: int, group: int | None = None) -> Sequence[int]:
    """How many micro-batches each group of an interleaved schedule has: all at least `ranks`, if there are so many.

    Raises:
        ScheduleError: the group is smaller than the pipeline.
    """
    size = ranks if group is None else group
    if size < ranks:
        raise ScheduleError(
            f"groups of {size} micro-batches are too small for {ranks} ranks: the first rank would wait for the last; "
            f"use at least {ranks}"
        )
    full, rest = divmod(micros, size)
    if rest == 0 or rest >= ranks or full == 0:
        return [size] * full + [rest] * (rest > 0)
    return [micros // full + (number < micros % full) for number in range(full)]
