"""Replicas as rows of machines, one for each stage, and torchft's way: those that are not whole are left out."""

from __future__ import annotations

import heapq
from collections.abc import Sequence

from resilin.planner.long_run.way import NOTHING, Slowness, Stop


class Rows:
    """Seat `stage * rows + row`: who is missing where.

    Args:
        seats: of all machines.
        stages: of the pipeline.
    """

    def __init__(self, seats: int, stages: int) -> None:
        self.rows = seats // stages
        self.whole = self.rows
        """Rows in which nobody is missing."""
        self._empty: list[list[int]] = [[] for _ in range(self.rows)]
        self._short: list[tuple[int, int]] = []  # (how many are missing, row), of which some are out of date

    def intact(self) -> set[int]:
        """Which are whole."""
        return {row for row, empty in enumerate(self._empty) if not empty}

    def lose(self, seat: int) -> bool:
        """A seat is empty; whether its row was whole."""
        row = seat % self.rows
        mine = self._empty[row]
        mine.append(seat)
        heapq.heappush(self._short, (len(mine), row))
        self.whole -= len(mine) == 1
        return len(mine) == 1

    def take(self) -> tuple[int, bool]:
        """An empty seat of the row that needs the fewest, and whether that is whole then.

        Raises:
            ValueError: all are taken.
        """
        while self._short:
            count, row = self._short[0]
            mine = self._empty[row]
            if not mine or len(mine) != count:
                heapq.heappop(self._short)
                continue
            heapq.heappop(self._short)
            seat = mine.pop()
            if mine:
                heapq.heappush(self._short, (len(mine), row))
            self.whole += not mine
            return seat, not mine
        raise ValueError("all seats are taken")


class Dropping:
    """A replica that lost a machine takes no part, and the batch shrinks: torchft's default.

    With spare ones the others compute the whole batch, more slowly, and nothing changes while there are enough of them:
    torchft's fixed world size.

    Args:
        seats: of all machines.
        stages: of the pipeline, inside a replica.
        seconds: until the others go on.
        redo: of the step under way: it is not committed.
        least: whole replicas without which the run stands.
        restart: seconds that it takes to begin again from a checkpoint, once none was whole.
        spare: whole replicas that wait.
    """

    def __init__(
        self, seats: int, stages: int, seconds: float, redo: float, least: int, restart: float, spare: int = 0
    ) -> None:
        self._rows = Rows(seats, stages)
        self._seconds, self._redo, self._least, self._restart = seconds, redo, least, restart
        self._most = self._rows.rows - spare
        if self._most < 1:
            raise ValueError(f"{spare} of {self._rows.rows} replicas cannot be spare: one at least computes")
        self._slow = Slowness()
        self._gone = False
        self.speed, self.heat = self._most / self._rows.rows, 1.0

    def lose(self, seats: Sequence[int], noticed: float) -> Stop:
        """Their replicas are out."""
        fewer = 0
        for seat in seats:
            self._slow.set(seat, 1.0)
            fewer += self._rows.lose(seat)
        self._go()
        return self._stop(noticed) if fewer else NOTHING

    def replace(self, seats: Sequence[int], noticed: float) -> Stop:
        """Spare machines read a healthy replica's states; where none is left, a checkpoint."""
        for seat in seats:
            self._slow.set(seat, 1.0)
        self._gone = self._gone or len({seat % self._rows.rows for seat in seats}) >= self._rows.rows
        return self._stop(noticed)

    def come(self) -> tuple[int, Stop]:
        """A replica that is whole again reads the others' states and joins."""
        seat, full = self._rows.take()
        if not full:
            return seat, NOTHING
        stood = self.speed == 0
        self._go()
        if stood and self.speed and self._gone:
            self._gone = False
            return seat, Stop(self._restart, 0.0, True)
        return seat, Stop(self._seconds) if self._rows.whole <= self._most else NOTHING

    def slow(self, seat: int, factor: float) -> None:
        """All wait for the slowest."""
        self._slow.set(seat, factor)
        self._go()

    def _stop(self, noticed: float) -> Stop:
        if self._gone and self.speed:  # nobody has the states any more
            self._gone = False
            return Stop(self._restart, 0.0, True)
        return Stop(self._seconds, 0.0 if noticed else self._redo)

    def _go(self) -> None:
        whole = self._rows.whole
        self._gone = self._gone or whole == 0
        used = min(whole, self._most)
        self.speed = used / self._rows.rows / self._slow.most if whole >= self._least else 0.0
