"""A decay of masked weights only, which grows from zero: they lose the competition slowly enough to win it back.

lambda(t) = alpha * t up to T0, then alpha * T0 ("annealed SR-STE"; SR-STE is Zhou et al., arXiv 2102.04010, where it
is constant). Source: Huang et al., arXiv 2407.20584.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from resilin.config import Settings, component
from resilin.nouns import Optimizer
from resilin.optim.schedule import Steps, count_steps
from resilin.optim.settings import OptimizerSettings
from resilin.sparsity.linear import SparseLinear
from resilin.sparsity.masks import sparse_layers
from resilin.sparsity.settings import SparsityError
from resilin.transforms import OptimizerTransform


class Ramp(Settings):
    """lambda(t): a straight line from 0 to `maximum` over the first `steps`, then constant."""

    maximum: float = Field(default=1e-4, ge=0)
    """alpha * T0. The paper's 6e-5 to 1e-4 belong to runs of 15 to 40 thousand steps; runs of hundreds of steps need
    far more: choose it so that `flip_rate` falls well below 1 % by the end."""
    steps: Steps = 0.25
    """T0, in steps or as a fraction of the run; 0: constant from the start (SR-STE)."""

    def at(self, step: int, total: int) -> float:
        """The lambda of step `step` (from 0) in a run of `total` steps."""
        length = count_steps(self.steps, total)
        return self.maximum * min(step / length, 1.0) if length else self.maximum


def masked_weights(model: nn.Module) -> dict[int, SparseLinear]:
    """The masked layers of a model by the `id` of their weight, which a training run never replaces.

    Raises:
        SparsityError: there is none.
    """
    found = {id(layer.weight): layer for _, layer in sparse_layers(model)}
    if not found:
        raise SparsityError(
            "a decay of masked weights needs a model with masks: set model.use = 'resilin.sparsity.settings:Sparse'"
        )
    return found


def decay_of(layer: SparseLinear, strength: float) -> Tensor:
    """The decay lambda * (1 - m) * W (D, C): of the sign of the masked weight, so that subtracting it shrinks it."""
    return torch.where(layer.mask, 0.0, layer.weight.detach()).mul_(strength)


class MaskDecay(OptimizerSettings):
    """Any optimizer, with lambda(t) * (1 - m) * W added to the gradients it sees.

    Around SGD without momentum this is W <- W - lr * (g + lambda * (1 - m) * W); around AdamW it is what the published
    LLaMA code does: the decay also enters the first moment. `resilin.sparsity.adamw:SparseAdamW` keeps it out.
    """

    ramp: Ramp = Ramp()
    """lambda(t)."""
    optimizer: Annotated[OptimizerSettings, component("resilin.optim.adamw:AdamW")] = Field(
        default_factory=dict, validate_default=True
    )

    def build(self, model: nn.Module, total_steps: int) -> Optimizer:
        """The optimizer around the one it wraps.

        Raises:
            SparsityError: the model has no masks.
        """
        layers = list(masked_weights(model).values())
        return MaskDecayOptimizer(self.optimizer.build(model, total_steps), self.ramp, layers, total_steps)


class MaskDecayOptimizer(OptimizerTransform):
    """Adds the decay to the gradients, after they were clipped, and logs `mask_decay`, its strength."""

    def __init__(self, inner: Optimizer, ramp: Ramp, layers: list[SparseLinear], total_steps: int) -> None:
        super().__init__(inner)
        self.ramp, self.layers, self.total_steps = ramp, layers, total_steps

    @torch.no_grad()
    def step(self, step: int) -> Mapping[str, float]:
        """The update of what is wrapped, from the gradients with the decay."""
        strength = self.ramp.at(step, self.total_steps)
        if strength:
            for layer in self.layers:
                if layer.weight.grad is not None:
                    layer.weight.grad.add_(decay_of(layer, strength))
        return {**self.inner.step(step), "mask_decay": strength}
