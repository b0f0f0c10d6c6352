"""An Objective transform: stay near the weights the run started from (L2-SP, Li et al., 2018)."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from resilin.config import component
from resilin.keys import Keys
from resilin.nouns import Batch, Loss, Mean, Objective
from resilin.objective.settings import ObjectiveContext, ObjectiveSettings, needed
from resilin.transforms import ObjectiveTransform


class Anchored(ObjectiveSettings):
    """Adds `strength / 2 * |theta - theta_0|^2` to the mean loss."""

    strength: float = Field(default=0.01, ge=0)
    """How strongly weights are pulled back."""
    objective: Annotated[ObjectiveSettings, component("resilin.objective.next_token:NextToken")] = Field(
        default_factory=dict, validate_default=True
    )
    """What is trained on."""

    def build(self, context: ObjectiveContext | None = None) -> AnchoredObjective:
        """The objective with its anchor: the run's model as it was before the first step."""
        inner = self.objective.build(context)
        anchor = needed(context, "Anchored").initial_model()
        return AnchoredObjective(inner, dict(anchor.named_parameters()), self.strength)


class AnchoredObjective(ObjectiveTransform):
    """The anchor is made again from the settings when a run goes on, so there is nothing to save."""

    def __init__(self, inner: Objective, anchor: dict[str, Tensor], strength: float) -> None:
        super().__init__(inner)
        self.anchor, self.strength = anchor, strength

    def __call__(self, model: nn.Module, batch: Batch, keys: Keys | None) -> Loss:
        """The inner loss, and the distance times its units: after the division by all units, it counts once."""
        loss = self.inner(model, batch, keys)
        named = [(p, self.anchor[name]) for name, p in model.named_parameters() if p.requires_grad]
        distance = torch.stack([(p - start).square().sum() for p, start in named]).sum()
        pulled = loss.sum + self.strength / 2 * distance * loss.units
        logs = {**loss.logs, "distance": Mean(distance.detach() * loss.units, loss.units)}
        return Loss(pulled, loss.units, logs)
