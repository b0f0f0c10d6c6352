"""How long something lasts: the laws that failures and repairs are drawn from."""

from __future__ import annotations

import math
from typing import Annotated, Literal

import numpy as np
import torch
from pydantic import Field

from resilin.config import Settings
from resilin.keys import Keys
from resilin.planner.long_run.trace import Floats, Ints


class Law(Settings):
    """A distribution of hours."""

    law: Literal["exponential", "weibull", "fixed"] = "exponential"
    """`exponential`: no memory. `weibull`: with `shape` below 1 what has just been repaired fails soonest. `fixed`:
    always the mean."""
    mean_hours: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    shape: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    """Of `weibull`; with 1 it is exponential. About 0.7 to 0.8 in clusters' records."""

    @property
    def mean(self) -> float:
        """In seconds."""
        return 3600 * self.mean_hours

    def seconds(self, uniform: Floats) -> Floats:
        """The law's quantiles: seconds of numbers that are uniform in (0, 1), of the same shape."""
        if self.law == "fixed":
            return np.full_like(uniform, self.mean)
        unit = -np.log(uniform)
        if self.law == "exponential" or self.shape == 1.0:
            return self.mean * unit
        scaled: Floats = self.mean / math.gamma(1 + 1 / self.shape) * unit ** (1 / self.shape)
        return scaled


def uniform(keys: Keys, slots_N: Ints, count: int) -> Floats:
    """(N, count) numbers in (0, 1) of 52 bits: equal slots have equal numbers, however many slots there are."""
    words_NK2 = Keys(keys.seed, keys.step, torch.from_numpy(slots_N), keys.path).bits((count, 2)).numpy()
    high_NK, low_NK = words_NK2[..., 0].astype(np.float64), (words_NK2[..., 1] >> 12).astype(np.float64)
    return (high_NK * 2.0**20 + low_NK + 0.5) * 2.0**-52
