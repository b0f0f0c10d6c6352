"""Weights that bring the losses of all kinds of tokens to one range.

ERNIE 5.0 rescales each modality's loss by a weight that follows the loss itself, without giving the formula. Here
w_m = c / EMA(loss_m), no gradient through it: the mean of a modality's weighted loss stays near c, so none drowns the
others because its tokens have many or few nats.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from pydantic import Field

from resilin.config import Settings


class BalanceSettings(Settings):
    """How losses are balanced."""

    level: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    """c: what each weighted loss is brought to."""
    decay: float = Field(default=0.99, ge=0, lt=1)
    """Of the moving average over steps."""
    floor: float = Field(default=0.01, gt=0)
    """The average counts as this at least: a loss that nearly vanishes does not get all the weight."""


class LossBalance:
    """Moving averages of the losses of whole steps, by name.

    Attributes:
        averages: of each kind that occurred.
    """

    def __init__(self, settings: BalanceSettings) -> None:
        self.settings = settings
        self.averages: dict[str, float] = {}

    def weight(self, kind: str) -> float:
        """W of a kind; 1 before its first step."""
        average = self.averages.get(kind)
        return 1.0 if average is None else self.settings.level / max(average, self.settings.floor)

    def observe(self, losses: Mapping[str, float]) -> None:
        """Take in the mean losses of a step; kinds that did not occur in it are NaN, and stay as they were."""
        for kind, loss in losses.items():
            if math.isfinite(loss):
                before, decay = self.averages.get(kind, loss), self.settings.decay
                self.averages[kind] = decay * before + (1 - decay) * loss
