"""The router of Nemotron Elastic (section 3.3): for each target a choice of sizes, by one small network for each axis.

    z = W2 LeakyReLU(W1 one_hot(target) + b1) + b2,    pi = softmax((scale z + gumbel noise) / temperature)

Shapes: R choices that are made on an axis, J sizes it has.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from resilin.keys import Keys
from resilin.models.linear import Linear
from resilin.nested.elastic_space import Axis


class AxisRouter(nn.Module):
    """The network of one axis."""

    def __init__(self, targets: int, axis: Axis, width: int, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.shape = (axis.rows, axis.choices)
        self.up = Linear(targets, width, device=device)
        self.down = Linear(width, axis.rows * axis.choices, device=device)

    def forward(self, target: int) -> Tensor:
        """(R, J) logits."""
        # The one-hot input picks a column.
        hidden = F.leaky_relu(self.up.weight[:, target] + self.up.bias)
        logits: Tensor = self.down(hidden).view(self.shape)
        return logits


class Router(nn.Module):
    """Logits of every axis for each target.

    Args:
        targets: how many there are.
        axes: of the model.
        width: of the networks (d_router).
        seed: of their initial weights; None leaves the memory unfilled.
        device: where they live.
    """

    def __init__(
        self,
        targets: int,
        axes: Sequence[Axis],
        width: int,
        seed: int | None = 0,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.axes = nn.ModuleDict({axis.name: AxisRouter(targets, axis, width, device) for axis in axes})
        if seed is not None:
            self._fill(seed)

    @torch.no_grad()
    def _fill(self, seed: int) -> None:
        keys = Keys.of_step(seed, 0).fold("router")
        for name, parameter in self.named_parameters():
            if parameter.ndim == 1:
                parameter.zero_()
            else:
                drawn = torch.empty(parameter.shape).normal_(generator=keys.fold(name).generator())
                # One column of `up` is read at a time; small logits leave all sizes about as likely.
                parameter.copy_(drawn if name.endswith("up.weight") else 0.1 * drawn * parameter.shape[1] ** -0.5)

    def forward(self, target: int) -> dict[str, Tensor]:
        """(R, J) logits of each axis."""
        return {name: head(target) for name, head in self.axes.items()}


def gumbel(keys: Keys, like: Tensor) -> Tensor:
    """-log(-log(u)), u uniform: noise of a tensor's shape from step-wide keys."""
    uniform = keys.uniform(tuple(like.shape), like.device).view(like.shape).double().clamp(1e-12, 1 - 1e-12)
    return -torch.log(-torch.log(uniform)).to(like.dtype)


def gumbel_softmax(logits_RJ: Tensor, temperature: float, scale: float, noise_RJ: Tensor | None) -> Tensor:
    """(R, J) probabilities; without noise those of a softmax that sharpens with the temperature."""
    scaled = logits_RJ * scale
    return ((scaled if noise_RJ is None else scaled + noise_RJ) / temperature).softmax(-1)
