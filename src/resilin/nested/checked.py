"""Objectives that refuse a model that does not fit before anything is computed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from torch import nn

from resilin.nouns import StepView, keeps_weights
from resilin.transforms import ObjectiveTransform


class CheckedLoss(ObjectiveTransform, ABC):
    """An objective made of an objective, for models of which something is asked."""

    @keeps_weights
    def before_step(self, view: StepView) -> None:
        """Refuses what does not fit."""
        super().before_step(view)
        self.check(view.model)

    @abstractmethod
    def check(self, model: nn.Module) -> Any:
        """Refuse what does not fit a model.

        Raises:
            BudgetError: naming it.
        """
