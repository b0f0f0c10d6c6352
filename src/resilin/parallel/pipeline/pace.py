"""How long a stage takes for one micro-batch, forward and backward together, as its own clock says."""

from __future__ import annotations

import statistics
from collections.abc import Collection
from dataclasses import dataclass

_WARM_UP = 1  # steps that are not counted: what is compiled, or allocated, is so in the first


@dataclass
class Pace:
    """A running mean over steps. Of a step the median of its micro-batches counts: a pause hits one of them.

    Attributes:
        steps: that were counted.
        seconds: of a micro-batch, on the mean of these; waiting for other stages is not counted.
    """

    steps: int = 0
    seconds: float = 0.0
    _seen: int = 0

    def step(self, took: Collection[float]) -> None:
        """One more step, whose micro-batches took so many seconds each."""
        if not took:
            return
        self._seen += 1
        if self._seen > _WARM_UP:
            self.steps += 1
            self.seconds += (statistics.median(took) - self.seconds) / self.steps
