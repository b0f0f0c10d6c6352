"""Restart from a checkpoint: whoever is lost ends the job, which begins again where it was last saved."""

from __future__ import annotations

from collections.abc import Sequence

from resilin.planner.long_run.pace import Paces
from resilin.planner.long_run.rows import Rows
from resilin.planner.long_run.way import NOTHING, Slowness, Stop


class Restart:
    """All machines or none; with `fewer`, as many whole replicas as there are, which share the batch.

    Args:
        seats: of all machines.
        stages: of the pipeline, each with equally many machines.
        paces: of fewer replicas; None: the job waits until all seats are taken.
        members: replicas of a stage on one machine.
        seconds: from a loss to the first step after the restart.
        saving: seconds of a checkpoint: an eviction that is known so long before loses nothing.
    """

    def __init__(
        self, seats: int, stages: int, paces: Paces | None, members: int, seconds: float, saving: float
    ) -> None:
        self._rows = Rows(seats, stages)
        self._paces, self._members, self._stages = paces, members, stages
        self._seconds, self._saving = seconds, saving
        self._slow = Slowness()
        self._usual = 0.0
        self._running = self._rows.rows  # replicas' rows of the job as it was started
        if paces is not None:
            pace = paces.of((self._rows.rows * members,) * stages, (1.0,) * stages)
            assert pace is not None
            self._usual = pace.seconds
        self.heat = 1.0
        self.speed = 0.0
        self._go()

    def lose(self, seats: Sequence[int], noticed: float) -> Stop:
        """All begin again, without these."""
        for seat in seats:
            self._slow.set(seat, 1.0)
            self._rows.lose(seat)
        return self._again(noticed)

    def replace(self, seats: Sequence[int], noticed: float) -> Stop:
        """All begin again, with the spare machines."""
        for seat in seats:
            self._slow.set(seat, 1.0)
        return self._again(noticed)

    def come(self) -> tuple[int, Stop]:
        """What was waited for begins; a job that runs on fewer stops for a whole replica more, having saved itself."""
        seat, full = self._rows.take()
        stood = self.speed == 0
        if not full and not stood:
            return seat, NOTHING
        before = self._running
        self._go()
        if self._running == before and not stood:
            return seat, NOTHING
        if not self.speed:
            return seat, NOTHING
        return seat, Stop(self._seconds) if stood else Stop(self._seconds + self._saving, saves=True)

    def slow(self, seat: int, factor: float) -> None:
        """All wait for the slowest."""
        self._slow.set(seat, factor)
        self._go()

    def _again(self, noticed: float) -> Stop:
        self._go()
        saves = noticed > 0 and noticed >= self._saving
        return Stop((self._seconds if self.speed else 0.0) + self._saving * saves, 0.0, not saves, saves)

    def _go(self) -> None:
        rows = self._rows.whole
        if self._paces is None:
            self._running, self.speed = rows, float(rows == self._rows.rows) / self._slow.most
            return
        self._running = rows
        pace = self._paces.of((rows * self._members,) * self._stages, (1.0,) * self._stages) if rows else None
        self.speed = self._usual / pace.seconds / self._slow.most if pace is not None else 0.0
