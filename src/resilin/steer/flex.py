"""When data are re-decided: warm-up, then windows, over and over. Pure arithmetic of the step.

Steps count from 0. A flex epoch is `warmup + update_steps * update_times` steps.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Window:
    """A stretch of steps whose data are decided at once.

    Attributes:
        epoch: which flex epoch, from 0.
        update: u: 0 for the warm-up, then from 1.
        start: its first step.
        steps: how many it has.
    """

    epoch: int
    update: int
    start: int
    steps: int


@dataclass(frozen=True, slots=True)
class FlexSchedule:
    """Attributes:
    warmup: steps on uniformly drawn data at the start of each flex epoch.
    update_steps: steps of a window.
    update_times: windows of a flex epoch.
    """

    warmup: int
    update_steps: int
    update_times: int

    @property
    def epoch_steps(self) -> int:
        """Steps of a flex epoch."""
        return self.warmup + self.update_steps * self.update_times

    def window(self, step: int) -> Window:
        """The window that `step` lies in."""
        epoch, place = divmod(step, self.epoch_steps)
        first = step - place
        if place < self.warmup:
            return Window(epoch, 0, first, self.warmup)
        number = (place - self.warmup) // self.update_steps
        return Window(epoch, number + 1, first + self.warmup + number * self.update_steps, self.update_steps)
