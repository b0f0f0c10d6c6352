"""What a run has to do, and what interrupts it by itself: steps, checkpoints, restarts."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Course:
    """A run that is to be played.

    Attributes:
        steps: of the whole batch.
        step_seconds: of one when nobody is missing.
        interval: seconds of work between two checkpoints; inf: there are none.
        checkpoint_seconds: for which the run stands still at each.
        limit: seconds after which it is given up.
    """

    steps: float
    step_seconds: float
    interval: float = math.inf
    checkpoint_seconds: float = 0.0
    limit: float = math.inf

    def __post_init__(self) -> None:
        if not (self.steps > 0 and self.step_seconds > 0 and math.isfinite(self.steps * self.step_seconds)):
            raise ValueError(f"a run has steps that take time, not {self.steps:g} of {self.step_seconds:g} s")
        if not (self.interval > 0 and 0 <= self.checkpoint_seconds < math.inf and self.limit > 0):
            raise ValueError(
                "seconds between checkpoints and the limit are positive, those of a checkpoint 0 at least; given are "
                f"{self.interval:g}, {self.limit:g} and {self.checkpoint_seconds:g}"
            )

    @property
    def plain(self) -> float:
        """Seconds of all steps when nothing happens and nothing is saved."""
        return self.steps * self.step_seconds
