"""A way to go on: what a run makes of machines that are lost, come or are slow."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol


class Stop(NamedTuple):
    """What a change costs at once.

    Attributes:
        seconds: for which nobody computes.
        redo: of the step under way, the share that is computed again.
        back: whether everything since the last checkpoint is.
        saves: whether the run is saved first, within `seconds`.
    """

    seconds: float = 0.0
    redo: float = 0.0
    back: bool = False
    saves: bool = False


NOTHING = Stop()


class Way(Protocol):
    """One policy and the state it is in. Seats are the places of the machines that compute, counted from 0.

    Attributes:
        speed: of useful work, over that when nobody is missing; 0: the run stands.
        heat: energy of its work over the usual (`resilin.planner.long_run.pace.Pace.heat`).
    """

    speed: float
    heat: float

    def lose(self, seats: Sequence[int], noticed: float) -> Stop:
        """Machines of some seats are gone.

        Args:
            seats: that were taken until now, and are empty.
            noticed: seconds by which that was known before.
        """

    def replace(self, seats: Sequence[int], noticed: float) -> Stop:
        """Machines of some seats are gone, and spare ones sit there at once."""

    def come(self) -> tuple[int, Stop]:
        """A machine is there for one of the empty seats: which is it given?"""

    def slow(self, seat: int, factor: float) -> None:
        """The machine of a seat takes so many times as long from now on."""


class Slowness:
    """By how much the slowest of some machines is slow; most of the time none is."""

    def __init__(self) -> None:
        self._of: dict[int, float] = {}

    def __len__(self) -> int:
        return len(self._of)

    def set(self, seat: int, factor: float) -> None:
        """Of one machine; 1 as the others."""
        if factor > 1:
            self._of[seat] = factor
        else:
            self._of.pop(seat, None)

    def of(self, seat: int) -> float:
        """Of one machine."""
        return self._of.get(seat, 1.0)

    @property
    def most(self) -> float:
        """Of the slowest."""
        return max(self._of.values(), default=1.0)
