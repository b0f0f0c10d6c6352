"""The base of every optimizer's settings."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import nn

from resilin.config import Settings
from resilin.nouns import Optimizer


class OptimizerSettings(Settings, ABC):
    """Settings that build an optimizer; `[optimizer] use = "package.module:Class"` names a subclass."""

    @abstractmethod
    def build(self, model: nn.Module, total_steps: int) -> Optimizer:
        """The optimizer of `model`'s trainable parameters.

        Args:
            model: already on its device: moments are created beside the parameters.
            total_steps: steps of the whole run, which schedules are fractions of.
        """
