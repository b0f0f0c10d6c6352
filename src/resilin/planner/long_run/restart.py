"""Restart from a checkpoint: whoever is lost ends the job, which begins again where it was last saved."""

from __future__ import annotations

import math
from collections.abc import Sequence

from resilin.planner.long_run.pace import Paces
from resilin.planner.long_run.rows import Rows
from resilin.planner.long_run.way import NOTHING, Slowness, Stop


class Restart:
    """All machines or none; with paces of fewer, as many whole replicas as there are, which share the batch.

    A replica that is whole again is taken in at the next restart, or at once where what it adds until the next loss is
    worth the restart.

    Args:
        seats: of all machines.
        stages: of the pipeline, each with equally many machines.
        paces: of fewer replicas; None: the job waits until all seats are taken.
        members: replicas of a stage on one machine.
        seconds: from a loss to the first step after the restart.
        saving: seconds of a checkpoint: an eviction that is known so long before loses nothing.
        apart: mean seconds between two losses.
    """

    def __init__(
        self,
        seats: int,
        stages: int,
        paces: Paces | None,
        members: int,
        seconds: float,
        saving: float,
        apart: float = math.inf,
    ) -> None:
        self._rows = Rows(seats, stages)
        self._paces, self._members, self._stages = paces, members, stages
        self._seconds, self._saving, self._apart = seconds, saving, apart
        self._slow = Slowness()
        self._job: set[int] = set()  # rows that compute
        self.heat = 1.0
        self.speed = 0.0
        self._usual = 1.0
        self._usual = self._of(self._rows.rows)
        self._start()

    def lose(self, seats: Sequence[int], noticed: float) -> Stop:
        """All begin again, without these; those that had not been taken in yet end nothing."""
        for seat in seats:
            self._slow.set(seat, 1.0)
            self._rows.lose(seat)
        if not any(seat % self._rows.rows in self._job for seat in seats):
            return NOTHING
        return self._again(noticed)

    def replace(self, seats: Sequence[int], noticed: float) -> Stop:
        """All begin again, with the spare machines."""
        for seat in seats:
            self._slow.set(seat, 1.0)
        if not any(seat % self._rows.rows in self._job for seat in seats):
            return NOTHING
        return self._again(noticed)

    def come(self) -> tuple[int, Stop]:
        """What was waited for begins; a job that runs on fewer may stop for a whole replica more, having saved
        itself.
        """
        seat, full = self._rows.take()
        if not self.speed:
            self._start()
            return seat, Stop(self._seconds) if self.speed else NOTHING
        cost = self._seconds + self._saving
        if full and (1 - self._of(len(self._job)) / self._of(self._rows.whole)) * self._apart > cost:
            self._start()
            return seat, Stop(cost, saves=True)
        return seat, NOTHING

    def slow(self, seat: int, factor: float) -> None:
        """All wait for the slowest."""
        self._slow.set(seat, factor)
        self._pace()

    def _again(self, noticed: float) -> Stop:
        self._start()
        saves = noticed > 0 and noticed >= self._saving
        return Stop((self._seconds if self.speed else 0.0) + self._saving * saves, 0.0, not saves, saves)

    def _start(self) -> None:
        self._job = self._rows.intact()
        self._pace()

    def _pace(self) -> None:
        self.speed = self._of(len(self._job)) / self._slow.most

    def _of(self, rows: int) -> float:
        """The speed of a job of so many rows."""
        if self._paces is None:
            return float(rows == self._rows.rows)
        pace = self._paces.of((rows * self._members,) * self._stages, (1.0,) * self._stages) if rows else None
        return 1 / pace.seconds / self._usual if pace is not None else 0.0
