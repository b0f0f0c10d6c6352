"""Stochastic gradient descent with momentum: the baseline other optimizers are measured against."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from resilin.optim.groups import Group
from resilin.optim.part import Moments, Part, root_mean_square, with_gradient
from resilin.optim.scheduled import Owned, ScheduledSettings


class SGDPart(Part):
    """b <- momentum * b + g; theta <- theta - s_t * (lr * Delta + decay * theta), Delta = b, or g + momentum * b."""

    def __init__(self, groups: Sequence[Group], lr: float, *, independent: bool, momentum: float, nesterov: bool):
        self.momentum, self.nesterov = momentum, nesterov
        super().__init__(groups, lr, independent=independent)

    def new_moments(self, parameter: nn.Parameter) -> Moments:
        """The momentum, where there is any."""
        return {"momentum": torch.zeros_like(parameter, requires_grad=False)} if self.momentum else {}

    def hyper_parameters(self) -> dict[str, Any]:
        """Those of torch's SGD."""
        return {"momentum": self.momentum, "nesterov": self.nesterov}

    def update(self, factor: float, *, record: bool) -> Mapping[str, Tensor]:
        """A few passes over each group."""
        deltas: dict[str, Tensor] = {}
        for pace, group in self.groups:
            members, moves = with_gradient(group)
            if not members:
                continue
            parameters: list[Tensor] = [m.parameter for m in members]
            if self.momentum:
                buffers = [m.moments["momentum"] for m in members]
                torch._foreach_mul_(buffers, self.momentum)
                torch._foreach_add_(buffers, moves)
                moves = list(torch._foreach_add(moves, buffers, alpha=self.momentum)) if self.nesterov else buffers
            if pace.decay:
                torch._foreach_mul_(parameters, 1 - factor * pace.decay)
            torch._foreach_add_(parameters, moves, alpha=-factor * pace.lr)
            if record:
                deltas |= {m.name: root_mean_square(move) for m, move in zip(members, moves, strict=True)}
        return deltas


class SGD(ScheduledSettings):
    """Gradient descent with momentum; weight decay is decoupled from the gradient, as everywhere here."""

    lr: float = Field(default=0.1, gt=0)
    """Peak learning rate."""
    weight_decay: float = Field(default=0.0, ge=0)
    """lambda: what decays per step, times the learning rate where `decay` is coupled."""
    momentum: float = Field(default=0.9, ge=0, lt=1)
    """Decay of the moving sum of gradients; 0: none is kept."""
    nesterov: bool = False
    """Look ahead by one step of momentum."""

    def parts(self, model: nn.Module, owned: Owned | None = None) -> list[Part]:
        """One part with all parameters."""
        independent = self.decay == "independent"
        groups = self.groups(model, owned)
        return [SGDPart(groups, self.lr, independent=independent, momentum=self.momentum, nesterov=self.nesterov)]
