"""Schedules that cut the backward in two, so that weight gradients fill what would be bubbles."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import replace

from resilin.parallel.pipeline.errors import ScheduleError
from resilin.parallel.pipeline.generate import interleaved, one_f_one_b
from resilin.parallel.pipeline.schedule import Action, B, F, I, Kind, Schedule, W, vee


def split_backward(schedule: Schedule, delay: Callable[[int], int], name: str) -> Schedule:
    """A schedule with every backward cut in two, each rank's weight gradients put off.

    Args:
        schedule: with whole backwards.
        delay: by rank, how many weight gradients may be owed after each input gradient.
        name: of the new schedule.
    """
    rows = []
    for rank, row in enumerate(schedule.actions):
        owed: deque[Action] = deque()
        most = delay(rank)
        new: list[Action] = []
        for action in row:
            if action.kind is not B:
                new.append(action)
                continue
            new.append(Action(I, action.stage, action.micro))
            owed.append(Action(W, action.stage, action.micro))
            if len(owed) > most:
                new.append(owed.popleft())
        rows.append((*new, *owed))
    return replace(schedule, actions=tuple(rows), name=name)


def zb_h1(stages: int, ranks: int, micros: int) -> Schedule:
    """1F1B in halves, with no more activations than 1F1B (Qi et al. 2023, arXiv 2401.10241, section 2.1).

    Rank `r` of `p` puts off its weight gradients by `r` micro-batches, so that all ranks hold `p`. For `m >= p` and
    `t_w` no longer than `t_f` and `t_i` the bubble is `(p - 1) (t_f + t_i - t_w)`: a third of 1F1B's where all
    three take the same time.
    """
    return split_backward(one_f_one_b(stages, ranks, micros), lambda rank: rank, "zb-h1")


def zb_interleaved(stages: int, ranks: int, micros: int, group: int | None = None) -> Schedule:
    """Interleaved 1F1B in halves: the bubble of ZB-H1 with the times of one of `v` stages of a rank.

    Rank `r` puts off `r` weight gradients, after which no rank holds more than interleaved 1F1B's first. Arguments and
    errors are those of `interleaved`.
    """
    base = interleaved(stages, ranks, micros, group)
    return split_backward(base, lambda rank: rank, "zb-interleaved")


def zb_v(stages: int, ranks: int, micros: int) -> Schedule:
    """Two stages a rank in a V, with no bubble inside a rank's own work (Qi et al. 2023, arXiv 2401.10241, section 6).

    Rank `r` holds stages `r` and `2 p - 1 - r`: the first rank has both ends of the model, and gradients turn round
    on the rank that made the loss. With `t_f = t_i = t_w` and `m >= 2 p - 1` every rank works without a pause from
    its first action to its last, and holds as much as 1F1B's first rank does: `2 p` stages' activations of half size.
    Ranks still start one forward after each other.

    Raises:
        ScheduleError: not two stages a rank.
    """
    rank_of = vee(stages, ranks)
    if stages != 2 * ranks:
        raise ScheduleError(f"zb-v has two stages for each rank, not {stages} on {ranks}")
    # Fewer micro-batches would not fill the V; the order is the full one's with the others left out.
    full = max(micros, 2 * ranks - 1)
    rows = []
    for rank in range(ranks):
        down, up = rank, stages - 1 - rank
        fill = [(F, down)] * (2 * (ranks - rank) - 1) + [(F, up), (F, down)] * rank
        turn = [(F, up), (I, up), (W, up)] * (ranks - rank)
        feeding = full - (2 * ranks - rank - 1)  # rounds of the steady part that still have a forward to begin with
        both = [(I, down), (W, down), (F, up), (I, up), (W, up)]
        steady = [(F, down), *both] * feeding + both * (full - ranks - feeding)
        drain = [(I, down), (I, up)] * rank + [(I, down), (W, down)] * (ranks - rank)
        rest = [(W, up)] * rank + [(W, down)] * rank
        made: dict[tuple[Kind, int], int] = {}
        row = []
        for what in (*fill, *turn, *steady, *drain, *rest):
            micro = made[what] = made.get(what, -1) + 1
            if micro < micros:
                row.append(Action(*what, micro))
        rows.append(tuple(row))
    return Schedule(tuple(rows), rank_of, micros, "zb-v")
