"""The piecewise constant schedule of image and video training."""

from __future__ import annotations

from pydantic import Field, model_validator

from resilin.optim.schedule import Schedule, Steps, count_steps


class Stepwise(Schedule):
    """The peak, multiplied by `gamma` at each boundary (and never below the minimum)."""

    boundaries: tuple[Steps, ...] = (0.5, 0.75)
    """Steps, or fractions of the run, at which the learning rate falls; increasing."""
    gamma: float = Field(default=0.1, gt=0, le=1)
    """What it is multiplied by at each."""

    @model_validator(mode="after")
    def _increasing(self) -> Stepwise:
        kinds = {type(boundary) for boundary in self.boundaries}
        if len(kinds) > 1:
            raise ValueError("boundaries are all numbers of steps (integers) or all fractions of the run, not both")
        if list(self.boundaries) != sorted(set(self.boundaries)):
            raise ValueError(f"boundaries {list(self.boundaries)} should increase")
        return self

    def factor(self, step: int, total: int, peak: float = 1.0) -> float:
        """`gamma` to the number of boundaries passed; the warm-up leads to its value at the warm-up's end."""
        warmup = count_steps(self.warmup, total)
        if step < warmup:
            return (step + 1) / warmup * self.stage_factor(self.stage(warmup, total), peak)
        return self.stage_factor(self.stage(step, total), peak)

    def stage(self, step: int, total: int) -> int:
        """How many boundaries lie at or before `step`."""
        return sum(step >= count_steps(boundary, total) for boundary in self.boundaries)

    def stage_factor(self, stage: int, peak: float = 1.0) -> float:
        """The factor after `stage` boundaries."""
        return max(self.gamma**stage, self.floor(peak))

    def shape(self, step: int, steps: int, warmup: int, floor: float) -> float:
        """The factor at `step` steps after the warm-up of a run of `steps + warmup`."""
        return max(float(self.gamma ** self.stage(step + warmup, steps + warmup)), floor)
