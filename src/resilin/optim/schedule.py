"""Learning-rate schedules: pure functions from the step to a factor in [0, 1] of the peak learning rate.

Every schedule warms up linearly, factor (t + 1) / W at step t < W, and ends at `total` (a step that is never taken),
so the last step still moves. After `total` (a run prolonged without new settings) the last factor stays.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from resilin.config import Settings


def _check_steps(value: int | float) -> int | float:
    if value < 0:
        raise ValueError("should be a number of steps, 0 or more, or a fraction of the run")
    if isinstance(value, float) and value > 1:
        raise ValueError(
            f"a fraction of the run is at most 1.0; a number of steps is written without a point: {value:.0f}"
        )
    return value


Steps = Annotated[int | float, AfterValidator(_check_steps)]
"""A number of steps (an integer) or a fraction of the run (a float in [0, 1])."""


def count_steps(steps: int | float, total: int) -> int:
    """`steps` as a number of steps: an integer as it is, a float as a fraction of `total`, rounded."""
    return steps if isinstance(steps, int) else round(steps * total)


class Schedule(Settings, ABC):
    """A linear warm-up followed by a shape. Subclasses give the shape."""

    warmup: Steps = 0.05
    """Steps of linear warm-up, or their fraction of the run."""
    min_lr: float | None = Field(default=None, ge=0)
    """Where decay ends, as a learning rate."""
    min_ratio: float | None = Field(default=None, ge=0, le=1)
    """Where decay ends, as a fraction of the peak learning rate; neither given: 0."""

    @model_validator(mode="after")
    def _one_floor(self) -> Schedule:
        if self.min_lr is not None and self.min_ratio is not None:
            raise ValueError("min_lr and min_ratio both say where decay ends: give one of them")
        return self

    def floor(self, peak: float) -> float:
        """Where decay ends, as a factor of the peak learning rate `peak`."""
        if self.min_lr is not None:
            return self.min_lr / peak
        return self.min_ratio or 0.0

    def factor(self, step: int, total: int, peak: float = 1.0) -> float:
        """The factor s_t in [0, 1] of step `step` (from 0) in a run of `total` steps.

        Args:
            step: from 0.
            total: steps of the whole run.
            peak: the peak learning rate, which turns `min_lr` into a factor.
        """
        warmup = count_steps(self.warmup, total)
        if step < warmup:
            return (step + 1) / warmup
        return self.shape(min(step, total) - warmup, max(total - warmup, 1), warmup, self.floor(peak))

    @abstractmethod
    def shape(self, step: int, steps: int, warmup: int, floor: float) -> float:
        """The factor after warm-up: 1 at `step` 0, `floor` (where it decays) at `step == steps`."""


class Constant(Schedule):
    """The peak learning rate for the whole run after warm-up."""

    def shape(self, step: int, steps: int, warmup: int, floor: float) -> float:
        """1."""
        return 1.0


class Linear(Schedule):
    """A straight line from the peak to the minimum."""

    def shape(self, step: int, steps: int, warmup: int, floor: float) -> float:
        """1 - (1 - floor) * progress."""
        return floor + (1 - floor) * (1 - step / steps)


class Cosine(Schedule):
    """Half a cosine from the peak to the minimum (Loshchilov and Hutter, SGDR, 2017, without restarts)."""

    def shape(self, step: int, steps: int, warmup: int, floor: float) -> float:
        """Floor + (1 - floor) * (1 + cos(pi * progress)) / 2."""
        return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * step / steps))


class InverseSqrt(Schedule):
    """sqrt(W / t) after a warm-up of W steps (Vaswani et al., 2017), not below the minimum."""

    def shape(self, step: int, steps: int, warmup: int, floor: float) -> float:
        """sqrt(W / (W + step)), with W at least 1."""
        warmup = max(warmup, 1)
        return max(floor, math.sqrt(warmup / (warmup + step)))


class WarmupStableDecay(Schedule):
    """Warm-up, a plateau at the peak, and a decay over the last steps (Hu et al., MiniCPM, 2024).

    A run can be prolonged from any checkpoint of the plateau, because nothing before the decay depends on `total`
    (with a warm-up given in steps).
    """

    decay: Steps = 0.2
    """Steps of decay at the end, or their fraction of the run."""
    decay_shape: Literal["linear", "cosine", "sqrt"] = "sqrt"
    """How it falls; `sqrt` is 1 - sqrt(progress) (Hagele et al., 2024)."""

    def factor(self, step: int, total: int, peak: float = 1.0) -> float:
        """Warm-up, then 1, then the decay over the last `decay` steps."""
        warmup = count_steps(self.warmup, total)
        if step < warmup:
            return (step + 1) / warmup
        decay = min(count_steps(self.decay, total), total - warmup)
        start = total - decay
        if step < start or decay <= 0:
            return 1.0
        return self.shape(min(step, total) - start, decay, warmup, self.floor(peak))

    def shape(self, step: int, steps: int, warmup: int, floor: float) -> float:
        """The decay: 1 at its start, `floor` at its end."""
        progress = step / steps
        match self.decay_shape:
            case "linear":
                rest = 1 - progress
            case "cosine":
                rest = 0.5 * (1 + math.cos(math.pi * progress))
            case "sqrt":
                rest = 1 - math.sqrt(progress)
        return floor + (1 - floor) * rest


class CosineThenLinear(Schedule):
    """Half a cosine down to the minimum, then a straight line to 0 over the last steps (GPT-2 runs of AST, 2024)."""

    cooldown: Steps = 0.05
    """Steps of the line to 0 at the end, or their fraction of the run; the cosine ends where it begins."""

    def factor(self, step: int, total: int, peak: float = 1.0) -> float:
        """Warm-up, the cosine to the minimum at `total - cooldown`, the line to 0 at `total`."""
        warmup = count_steps(self.warmup, total)
        if step < warmup:
            return (step + 1) / warmup
        cooldown = min(count_steps(self.cooldown, total), total - warmup)
        start, floor = total - cooldown, self.floor(peak)
        if step < start or cooldown <= 0:
            return self.shape(min(step, start) - warmup, max(start - warmup, 1), warmup, floor)
        top = floor if start > warmup else 1.0  # no room for a cosine: the line starts at the peak
        return top * (1 - (min(step, total) - start) / cooldown)

    def shape(self, step: int, steps: int, warmup: int, floor: float) -> float:
        """Floor + (1 - floor) * (1 + cos(pi * progress)) / 2."""
        return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * step / steps))
