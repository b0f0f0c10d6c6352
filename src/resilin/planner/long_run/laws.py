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
    """`exponential`: no memory. `weibull`: with `shape` below 1 what has just been repaired fails soonest. `fixed`: always
    the mean."""
    mean_hours: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    shape: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    """Of `weibull`; with 1 it is exponential. About 0.7 to 0.8 in clusters' records."""

    @property
    def mean(self) -> float:
        """In seconds."""
        return 3600 * self.mean_hours

    def seconds(self, uniform_N: Floats) -> Floats:
        """The law's quantiles: (N,) seconds of numbers that are uniform in (0, 1)."""
        if self.law == "fixed":
            return np.full_like(uniform_N, self.mean)
        unit_N = -np.log(uniform_N)
        if self.law == "exponential" or self.shape == 1.0:
            return self.mean * unit_N
        scaled_N: Floats = self.mean / math.gamma(1 + 1 / self.shape) * unit_N ** (1 / self.shape)
        return scaled_N


def uniform(keys: Keys, slots_N: Ints) -> Floats:
    """(N,) numbers in (0, 1) of 52 bits, one for each slot: equal slots have equal numbers, however many there are."""
    words_N4 = Keys(keys.seed, keys.step, torch.from_numpy(slots_N), keys.path).bits((2,)).numpy()
    high_N, low_N = words_N4[:, 0].astype(np.float64), (words_N4[:, 1] >> 12).astype(np.float64)
    return (high_N * 2.0**20 + low_N + 0.5) * 2.0**-52
