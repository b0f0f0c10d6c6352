"""An Optimizer transform: k fast steps, then one slow one towards them (Lookahead, Zhang et al., 2019)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

import torch
from pydantic import Field
from torch import nn

from resilin.config import component
from resilin.nouns import Optimizer, State
from resilin.optim.settings import OptimizerSettings
from resilin.transforms import OptimizerTransform


class Lookahead(OptimizerSettings):
    """Every k steps: slow += alpha * (fast - slow), and the fast weights start again from there."""

    k: int = Field(default=5, ge=1)
    """Fast steps for each slow one."""
    alpha: float = Field(default=0.5, gt=0, le=1)
    """How far the slow weights go."""
    optimizer: Annotated[OptimizerSettings, component("resilin.optim.adamw:AdamW")] = Field(
        default_factory=dict, validate_default=True
    )
    """What takes the fast steps."""

    def build(self, model: nn.Module, total_steps: int) -> LookaheadOptimizer:
        """The inner optimizer with slow weights beside it."""
        return LookaheadOptimizer(self.optimizer.build(model, total_steps), model, self.k, self.alpha)


class LookaheadOptimizer(OptimizerTransform):
    """Its slow weights are state: saved and resumed with the inner optimizer's moments."""

    def __init__(self, inner: Optimizer, model: nn.Module, k: int, alpha: float) -> None:
        super().__init__(inner)
        self.fast = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.slow = {name: p.detach().clone() for name, p in self.fast.items()}
        self.k, self.alpha = k, alpha

    @torch.no_grad()
    def step(self, step: int) -> Mapping[str, float]:
        """The inner step and, after every k-th, the slow one."""
        logs = self.inner.step(step)
        if (step + 1) % self.k == 0:
            for name, fast in self.fast.items():
                fast.copy_(self.slow[name].lerp_(fast, self.alpha))
        return logs

    def own_state(self) -> State:
        """The slow weights by parameter name."""
        return dict(self.slow)

    def load_own_state(self, state: State) -> None:
        """Take them back."""
        for name, tensor in self.slow.items():
            tensor.copy_(state[name])
