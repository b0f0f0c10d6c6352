"""A loss times a constant: what Adam's eps should not, but does, notice."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field
from torch import nn

from resilin.config import component
from resilin.keys import Keys
from resilin.nouns import Batch, Loss, Objective
from resilin.objective.settings import ObjectiveContext, ObjectiveSettings
from resilin.transforms import ObjectiveTransform


class ScaledObjective(ObjectiveTransform):
    """An objective whose loss, and so its gradient, is multiplied by a factor; its logs are as they were."""

    def __init__(self, inner: Objective, factor: float):
        super().__init__(inner)
        self.factor = factor

    def __call__(self, model: nn.Module, batch: Batch, keys: Keys | None) -> Loss:
        """The inner loss times the factor."""
        loss = self.inner(model, batch, keys)
        return Loss(loss.sum * self.factor, loss.units, loss.logs)


class Scaled(ObjectiveSettings):
    """Train on an objective times a factor, to give a small model the small gradients of a large one."""

    factor: float = Field(default=1.0, gt=0)
    """Without eps, Adam would learn the same at any factor."""
    objective: Annotated[ObjectiveSettings, component("resilin.objective.next_token:NextToken")] = Field(
        default_factory=dict, validate_default=True
    )
    """What is multiplied."""

    def build(self, context: ObjectiveContext | None = None) -> ScaledObjective:
        """The objective times the factor."""
        return ScaledObjective(self.objective.build(context), self.factor)
