"""Oobleck's way: pipelines of unlike numbers of machines, each from a template, that share the batch as they are quick.

A machine lost makes its pipeline one stage shorter; one that would be too short borrows a machine from the longest, or
is given up and its machines lengthen others. The step under way is lost (arXiv 2309.08125).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from resilin.parallel.pipeline import balanced
from resilin.planner.long_run.pace import Job
from resilin.planner.long_run.way import Slowness, Stop


class Templates:
    """The quickest split of the layers over so many machines, and how soon such pipelines have done a batch.

    Args:
        job: what is trained; its stages are those of the longest pipeline.
        members: pipelines that stand side by side on the machines of one.
    """

    def __init__(self, job: Job, members: int) -> None:
        self._job, self._each = job, members
        self._ticks: dict[int, float] = {}
        self._known: dict[tuple[int, ...], float] = {}

    def tick(self, stages: int) -> float:
        """Seconds of one micro-batch at the slowest of so many stages."""
        if stages not in self._ticks:
            layers = self._job.layers
            split = balanced(
                layers.seconds, stages, layers.embedding, layers.head, [1] * stages, lambda _, first, end: end > first
            )
            self._ticks[stages] = float(max(layers.of_stages(split)))
        return self._ticks[stages]

    def seconds(self, counts: tuple[int, ...]) -> float:
        """Of a step by `counts[n]` rows of pipelines of n machines: the least in which they can do all micro-batches.

        A pipeline of n stages does m in (m + n - 1) ticks (1F1B).
        """
        if counts not in self._known:
            self._known[counts] = self._least(counts)
        return self._known[counts]

    def _least(self, counts: tuple[int, ...]) -> float:
        shapes = [(length, rows * self._each) for length, rows in enumerate(counts) if rows]

        def done(seconds: float) -> int:
            return sum(
                rows * max(int(seconds / self.tick(length) * (1 + 1e-12)) - length + 1, 0) for length, rows in shapes
            )

        if not shapes:
            return float("inf")
        pipelines = sum(rows for _, rows in shapes)
        high = max((-(-self._job.micros // pipelines) + length) * self.tick(length) for length, _ in shapes)
        low = 0.0
        while high - low > 1e-9 * high:
            half = (low + high) / 2
            low, high = (low, half) if done(half) >= self._job.micros else (half, high)
        return high


class Reshaping:
    """Pipelines made anew from templates whenever somebody goes or comes.

    Args:
        seats: of all machines.
        templates: of pipelines, the longest of which have `stages` machines.
        stages: of those.
        shortest: machines that a pipeline needs: the model has to fit.
        seconds: until all go on after a loss.
        joining: and after somebody has come.
        redo: of the step under way.
        least: pipelines (rows of them) without which no states are left.
        restart: seconds to begin again from a checkpoint.
    """

    def __init__(
        self,
        seats: int,
        templates: Templates,
        stages: int,
        shortest: int,
        seconds: float,
        joining: float,
        redo: float,
        restart: float,
    ) -> None:
        if not 1 <= shortest <= stages:
            raise ValueError(f"the shortest pipeline has 1 to {stages} machines, not {shortest}")
        self._templates, self._longest, self._shortest = templates, stages, shortest
        self._seconds, self._joining, self._redo, self._restart = seconds, joining, redo, restart
        rows = seats // stages
        self._of = [seat % rows for seat in range(seats)]  # the row of pipelines that a seat is in, -1: none
        self._in: list[set[int]] = [{row + rows * stage for stage in range(stages)} for row in range(rows)]
        self._sized: list[set[int]] = [set() for _ in range(stages + 1)]
        self._sized[stages] = set(range(rows))
        self._empty: list[int] = []
        self._idle: list[int] = []  # machines that no pipeline has a place for
        self._slow = Slowness()
        self._usual = templates.seconds(self._counts)
        self._gone = False
        self.speed, self.heat = 1.0, 1.0

    @property
    def _counts(self) -> tuple[int, ...]:
        return tuple(len(rows) for rows in self._sized)

    @property
    def lengths(self) -> tuple[int, ...]:
        """How many rows of pipelines there are of 0, 1, ... machines (0: given up)."""
        return (sum(not mine for mine in self._in), *self._counts[1:])

    def lose(self, seats: Sequence[int], noticed: float) -> Stop:
        """Their pipelines are made shorter, or given up."""
        for seat in seats:
            self._slow.set(seat, 1.0)
            self._empty.append(seat)
            row = self._of[seat]
            self._of[seat] = -1
            if row < 0:
                self._idle.remove(seat)
                continue
            self._resize(row, lambda mine, seat=seat: mine.discard(seat))  # type: ignore[misc]
        for row in [row for length in range(1, self._shortest) for row in self._sized[length]]:
            self._mend(row)
        self._deal()
        return self._stop(noticed)

    def replace(self, seats: Sequence[int], noticed: float) -> Stop:
        """Spare machines take their places in the pipelines."""
        for seat in seats:
            self._slow.set(seat, 1.0)
        return self._stop(noticed)

    def come(self) -> tuple[int, Stop]:
        """To the shortest pipeline; where all are whole, or for a new one when enough wait for that."""
        seat = self._empty.pop()
        stood = self.speed == 0
        self._idle.append(seat)
        self._deal()
        self._go()
        if stood and self.speed and self._gone:
            self._gone = False
            return seat, Stop(self._restart, 0.0, True)
        return seat, Stop(self._joining)

    def slow(self, seat: int, factor: float) -> None:
        """All wait for the slowest."""
        self._slow.set(seat, factor)
        self._go()

    def _resize(self, row: int, edit: Callable[[set[int]], None]) -> None:
        mine = self._in[row]
        self._sized[len(mine)].discard(row)
        edit(mine)
        if mine:
            self._sized[len(mine)].add(row)

    def _mend(self, row: int) -> None:
        """A pipeline that is too short borrows from the longest, or is given up."""
        while len(self._in[row]) < self._shortest:
            longest = next((n for n in range(self._longest, self._shortest, -1) if self._sized[n]), 0)
            if not longest and not self._idle:
                break
            self._move(self._idle.pop() if self._idle else self._lend(min(self._sized[longest])), row)
        if len(self._in[row]) < self._shortest:
            left = sorted(self._in[row])
            self._resize(row, lambda mine: mine.clear())
            for seat in left:
                self._of[seat] = -1
                self._idle.append(seat)
            self._deal()

    def _lend(self, row: int) -> int:
        seat = max(self._in[row])
        self._resize(row, lambda mine: mine.discard(seat))
        return seat

    def _move(self, seat: int, row: int) -> None:
        self._of[seat] = row
        self._resize(row, lambda mine: mine.add(seat))

    def _deal(self) -> None:
        """Machines that wait: enough for a pipeline are one, and others make the shortest longer."""
        while len(self._idle) >= self._shortest and any(not mine for mine in self._in):
            row = next(row for row, mine in enumerate(self._in) if not mine)
            for _ in range(self._shortest):
                self._move(self._idle.pop(), row)
        while self._idle:
            short = next((n for n in range(self._shortest, self._longest) if self._sized[n]), 0)
            if not short:
                break
            self._move(self._idle.pop(), min(self._sized[short]))

    def _stop(self, noticed: float) -> Stop:
        self._go()
        if self._gone and self.speed:
            self._gone = False
            return Stop(self._restart, 0.0, True)
        return Stop(self._seconds, 0.0 if noticed else self._redo)

    def _go(self) -> None:
        seconds = self._templates.seconds(self._counts)
        self._gone = self._gone or seconds == float("inf")
        self.speed = self._usual / seconds / self._slow.most
