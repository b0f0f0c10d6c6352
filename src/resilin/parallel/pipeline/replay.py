"""What an action waits for, and an order in which all of them can run."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

from resilin.parallel.pipeline.errors import ScheduleError
from resilin.parallel.pipeline.schedule import Action, F, Schedule, W


class _Progress:
    """Which actions of a schedule are done, and what each waits for; cells of lists, so that large ones are quick.

    A cell is `stage * micros + micro`; a backward of either form marks `back`, since whoever waits for a gradient of
    an input does not care how it was made.
    """

    def __init__(self, schedule: Schedule) -> None:
        self._micros = schedule.micros
        self._last = (schedule.stages - 1) * schedule.micros
        cells = schedule.stages * schedule.micros
        self._forward = bytearray(cells)
        self._back = bytearray(cells)

    def missing(self, action: Action) -> tuple[bool, int] | None:
        """(is a backward, cell) of something it still waits for; None when it can run."""
        cell = action.stage * self._micros + action.micro
        kind = action.kind
        if kind is F:
            before = cell - self._micros
            return (False, before) if before >= 0 and not self._forward[before] else None
        if kind is W:
            return None if self._back[cell] else (True, cell)
        if not self._forward[cell]:
            return (False, cell)
        if cell < self._last and not self._back[cell + self._micros]:
            return (True, cell + self._micros)
        return None

    def done(self, action: Action) -> tuple[bool, int] | None:
        """Marks it; returns what somebody may have waited for."""
        cell = action.stage * self._micros + action.micro
        if action.kind is F:
            self._forward[cell] = 1
            return (False, cell)
        if action.kind is W:
            return None
        self._back[cell] = 1
        return (True, cell)


def replay(schedule: Schedule) -> Iterator[tuple[int, Action]]:
    """(rank, action) in an order in which whatever an action waits for comes before it.

    Every rank keeps its own order and goes on as far as it can. Takes time in proportion to the actions.

    Raises:
        ScheduleError: nobody can go on: the deadlock, rank by rank.
    """
    progress = _Progress(schedule)
    at = [0] * schedule.ranks
    waiting: dict[tuple[bool, int], list[int]] = {}
    ready = deque(range(schedule.ranks))
    while ready:
        rank = ready.popleft()
        row = schedule.actions[rank]
        while at[rank] < len(row):
            action = row[at[rank]]
            wanted = progress.missing(action)
            if wanted is not None:
                waiting.setdefault(wanted, []).append(rank)
                break
            at[rank] += 1
            made = progress.done(action)
            yield rank, action
            if made in waiting:
                ready.extend(waiting.pop(made))
    if waiting:
        raise ScheduleError(_deadlock(schedule, at, waiting))


def _deadlock(schedule: Schedule, at: list[int], waiting: dict[tuple[bool, int], list[int]]) -> str:
    """The circle of ranks that wait for each other, or the action that nobody has."""
    blocked = {rank: wanted for wanted, ranks in waiting.items() for rank in ranks}
    holders: dict[tuple[bool, int], tuple[int, Action]] = {}
    for rank, row in enumerate(schedule.actions):
        for action in row[at[rank] :]:
            if action.kind is not W:
                holders.setdefault(
                    (action.kind is not F, action.stage * schedule.micros + action.micro), (rank, action)
                )
    said, seen = [], []
    rank = next(iter(blocked))
    while rank not in seen:
        seen.append(rank)
        wanted = blocked[rank]
        stage, micro = divmod(wanted[1], schedule.micros)
        what = f"the {'backward' if wanted[0] else 'forward'} of stage {stage} for micro-batch {micro}"
        action = schedule.actions[rank][at[rank]]
        if wanted not in holders:
            return f"rank {rank} waits at {action} for {what}, which no rank does"
        owner, other = holders[wanted]
        said.append((rank, action, other, owner))
        if owner not in blocked:
            break
        rank = owner
    circle = said[seen.index(rank) :] if rank in seen else said
    waits = "; ".join(f"rank {r} waits at {a} for {o} of rank {w}" for r, a, o, w in circle)
    return f"the schedule deadlocks: {waits}. Move what is waited for to an earlier place in its rank's order"
