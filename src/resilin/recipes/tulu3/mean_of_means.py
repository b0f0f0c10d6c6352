"""The mistake that sums and counts avoid: every micro-batch's mean counts the same, however few tokens it has."""

from __future__ import annotations

from typing import Annotated

import torch
from torch import nn

from resilin.config import component
from resilin.keys import Keys
from resilin.nouns import Batch, Loss
from resilin.objective.settings import ObjectiveContext, ObjectiveSettings
from resilin.transforms import ObjectiveTransform


class MeanOfMeans(ObjectiveSettings):
    """The mean over micro-batches of each one's own mean, while training; evaluated as it should be."""

    objective: Annotated[ObjectiveSettings, component("resilin.objective.next_token:NextToken")]
    """What is averaged."""

    def build(self, context: ObjectiveContext | None = None) -> ObjectiveTransform:
        """The objective."""
        return _MeanOfMeans(self.objective.build(context))


class _MeanOfMeans(ObjectiveTransform):
    def __call__(self, model: nn.Module, batch: Batch, keys: Keys | None) -> Loss:
        loss = super().__call__(model, batch, keys)
        if keys is None or not float(loss.units):
            return loss
        return Loss(loss.sum / loss.units, torch.ones_like(loss.units), loss.logs)
