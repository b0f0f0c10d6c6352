"""The settings of a looped decoder: its blocks are run several times, with the same weights.

A **trajectory** is a list of steps on [0, 1], one for each loop, told as whole numbers: (2, 1, 1) are steps of 2/4, 1/4
and 1/4. Times are sums of whole numbers, so nothing is rounded on the way.
"""

from __future__ import annotations

from math import gcd
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from resilin.config import Settings

PositiveInt = Annotated[int, Field(gt=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
Condition = Literal["time_and_step", "index", "none"]


class LoopSettings(Settings):
    """All blocks are run one after another, then again, `times` times in all (LoopFormer, 2026)."""

    times: PositiveInt = 8
    """How often the blocks are run: L of the paper."""
    steps: tuple[PositiveInt, ...] = ()
    """The step of each loop, in any proportion: [4, 1, 1] are steps of 4/6, 1/6 and 1/6; empty: all alike."""
    condition: Condition = "time_and_step"
    """What blocks are told of a loop: the time it begins at and the size of its step (LoopFormer), which number it has
    (TMLT), or nothing. Told blocks have no norm weights: what they are told scales their norms and their branches."""
    time_scale: PositiveFloat = 1.0
    """Factor of times, step sizes and loop numbers before their sinusoids. With 1, as published, most of the 128
    frequencies hardly change on [0, 1]; diffusion models use 1000."""
    frequencies: Annotated[int, Field(gt=0, multiple_of=2)] = 256
    """Sines and cosines of an embedded time, together."""
    start: Literal["identity", "small"] = "identity"
    """identity: what blocks are told has no weight at first, and a loop changes nothing (adaLN-zero). small: as the
    published code starts in effect: N(0, init_std), and projections back to the stream 1 / sqrt(2 layers) of that."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.steps and len(self.steps) != self.times:
            raise ValueError(f"loop.steps has {len(self.steps)} entries for {self.times} loops: give one for each")
        if self.steps and self.condition != "time_and_step":
            raise ValueError(
                f"loop.steps: blocks with condition = {self.condition!r} do not know of steps; leave it empty"
            )
        return self

    @property
    def trajectory(self) -> tuple[int, ...]:
        """The steps, as the smallest whole numbers of their proportion."""
        return reduced(self.steps or (1,) * self.times)


def reduced(steps: tuple[int, ...]) -> tuple[int, ...]:
    """The same proportions in the smallest whole numbers."""
    common = gcd(*steps)
    return tuple(step // common for step in steps)
