"""Whether a schedule does everything once, where it can, without deadlock, within a limit of memory."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from resilin.parallel.pipeline.errors import ScheduleError
from resilin.parallel.pipeline.replay import replay
from resilin.parallel.pipeline.schedule import Action, B, F, I, Kind, Schedule, W
from resilin.parallel.pipeline.timeline import Time


def validate(schedule: Schedule, limit: Time | None = None) -> None:
    """Refuses a schedule that cannot be run.

    Every stage has a rank; each stage has, for each micro-batch, one forward and one backward, whole (B) or in halves
    (I and W), on that rank; and no rank waits for ever. A schedule that passes can always be run with messages that
    block both sides until they meet: `lower` gives the order. Takes time in proportion to the actions.

    Args:
        schedule: any.
        limit: of activations that a rank may hold at once, counted as `peak_in_flight` does.

    Raises:
        ScheduleError: naming the action, the rank and what is missing.
    """
    _check_places(schedule)
    _check_counts(schedule)
    _check_order_of_ranks(schedule)
    deque(replay(schedule), maxlen=0)
    if limit is not None:
        _check_peak(schedule, limit)


def peak_in_flight(schedule: Schedule, of_stage: Sequence[Time] = (), after_input: Time = 1) -> tuple[Time, ...]:
    """The most activations each rank holds at one time.

    They live from F to B, or to W where the backward is in halves. It follows from the order alone, whatever the times.

    Args:
        schedule: any.
        of_stage: the activations of one micro-batch at each stage, such as bytes; by default 1 each.
        after_input: the part that W still needs once I is done, from 0 to 1 (`M_W / M_B` in Qi et al. 2023).

    Raises:
        ScheduleError: `of_stage` does not have one number for each stage.
    """
    if of_stage and len(of_stage) != schedule.stages:
        raise ScheduleError(f"{len(of_stage)} sizes of activations are given for {schedule.stages} stages")
    sizes = of_stage or [1] * schedule.stages
    change = _changes(after_input)
    peaks: list[Time] = []
    for row in schedule.actions:
        held: Time = 0
        peak: Time = 0
        for action in row:
            held += change[action.kind] * sizes[action.stage]
            peak = max(peak, held)
        peaks.append(peak)
    return tuple(peaks)


def _changes(after_input: Time) -> dict[Kind, Time]:
    return {F: 1, B: -1, I: after_input - 1, W: -after_input}


def _check_places(schedule: Schedule) -> None:
    if not schedule.actions or not schedule.rank_of or schedule.micros < 1:
        raise ScheduleError("a schedule needs at least one rank, one stage and one micro-batch")
    for stage, rank in enumerate(schedule.rank_of):
        if not 0 <= rank < schedule.ranks:
            raise ScheduleError(f"stage {stage} is on rank {rank}, but there are only ranks 0 to {schedule.ranks - 1}")
    for rank, row in enumerate(schedule.actions):
        for action in row:
            if not (0 <= action.stage < schedule.stages and 0 <= action.micro < schedule.micros):
                raise ScheduleError(
                    f"rank {rank}: {action} is outside the {schedule.stages} stages and {schedule.micros} micro-batches"
                )
            if schedule.rank_of[action.stage] != rank:
                raise ScheduleError(
                    f"rank {rank}: {action} belongs to rank {schedule.rank_of[action.stage]}, which holds stage "
                    f"{action.stage}"
                )


def _check_counts(schedule: Schedule) -> None:
    micros = schedule.micros
    seen = {kind: bytearray(schedule.stages * micros) for kind in Kind}
    for rank, row in enumerate(schedule.actions):
        for action in row:
            cell = action.stage * micros + action.micro
            if seen[action.kind][cell]:
                raise ScheduleError(f"rank {rank}: {action} is there twice")
            seen[action.kind][cell] = 1
    for stage, rank in enumerate(schedule.rank_of):
        for micro in range(micros):
            f, b, i, w = (seen[kind][stage * micros + micro] for kind in (F, B, I, W))
            if f and b + i == 1 and i == w:
                continue
            if not f:
                raise ScheduleError(f"rank {rank}: {Action(F, stage, micro)} is missing")
            if b and (i or w):
                other = Action(I if i else W, stage, micro)
                raise ScheduleError(
                    f"rank {rank}: {Action(B, stage, micro)} and {other} are both there: a backward is whole (B), or "
                    "in halves (I and W)"
                )
            lost = Action(W, stage, micro) if i else Action(I if w else B, stage, micro)
            or_halves = " (or both of its halves, I and W)" if lost.kind is B else ""
            raise ScheduleError(f"rank {rank}: {lost}{or_halves} is missing")


def _check_order_of_ranks(schedule: Schedule) -> None:
    """What one rank's own order gets wrong is said simply, not as a deadlock of a rank with itself."""
    micros = schedule.micros
    for rank, row in enumerate(schedule.actions):
        forward, back = bytearray(schedule.stages * micros), bytearray(schedule.stages * micros)
        for action in row:
            cell = action.stage * micros + action.micro
            if action.kind is F:
                forward[cell] = 1
                continue
            done, first = (back, I) if action.kind is W else (forward, F)
            if not done[cell]:
                raise ScheduleError(
                    f"rank {rank}: {action} comes before {Action(first, action.stage, action.micro)}, whose results "
                    "it needs"
                )
            back[cell] = 1


def _check_peak(schedule: Schedule, limit: Time) -> None:
    change = _changes(1)
    for rank, row in enumerate(schedule.actions):
        held: Time = 0
        for action in row:
            held += change[action.kind]
            if held > limit:
                raise ScheduleError(
                    f"rank {rank}: {action} would make it hold the activations of {held} forwards; the limit is "
                    f"{limit}, and this schedule needs {max(peak_in_flight(schedule))}"
                )
