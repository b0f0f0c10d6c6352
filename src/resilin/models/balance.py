"""Balancing the load of experts without a loss: how a step's loads reach the offsets that experts are chosen by.

    after each step   b_i <- b_i + u * sign(mean load - load_i)

over the experts that could be chosen in the step (Wang et al., "Auxiliary-loss-free load balancing strategy for
mixture-of-experts", 2024; DeepSeek-V3; ERNIE 5.0). The loads of a step are sums over its tokens, as gradients are. So
they travel as the offsets' gradient: whatever adds up gradients over tiles, micro-batches, stages and ranks adds up
loads, and an update by sign (`resilin.optim.sign`) does the rest. An expert that could not be chosen has gradient zero,
and stays.

Shapes: N tokens, k choices per token, E experts that may be chosen.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from resilin.models.function import PlainFunction

TINY = 2.0**-80
"""Of a load in the gradient, where only its sign counts. Loads are whole numbers, so sums of them are exact in whatever
order they are added; so small, they do not change a bit of the gradients' common norm, and clip nothing."""


class _Counted(PlainFunction):
    """The weights as they are; the gradient of the offsets is what was counted."""

    @staticmethod
    def forward(weights_Nk: Tensor, offsets_E: Tensor, gradient_E: Tensor) -> Tensor:
        return weights_Nk.view_as(weights_Nk)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(inputs[2])

    @staticmethod
    def backward(ctx: Any, grad_Nk: Tensor) -> tuple[Tensor, Tensor, None]:
        (gradient_E,) = ctx.saved_tensors
        return grad_Nk, gradient_E, None


def excess(chosen_Nk: Tensor, experts: int) -> Tensor:
    """(E,) float32, whole numbers: E times how far each expert's load is above the mean, load_i * E - N * k."""
    with torch.no_grad():
        picks_NE = torch.zeros(len(chosen_Nk), experts, device=chosen_Nk.device).scatter_(1, chosen_Nk, 1.0)
        return picks_NE.sum(0) * experts - chosen_Nk.numel()


def counted(weights_Nk: Tensor, chosen_Nk: Tensor, offsets_E: Tensor) -> Tensor:
    """The weights of the choices, unchanged; a backward pass through them gives the offsets their step's loads.

    Args:
        weights_Nk: of the choices.
        chosen_Nk: numbers, among the experts that may be chosen.
        offsets_E: of those experts.
    """
    if not torch.is_grad_enabled() or not offsets_E.requires_grad:
        return weights_Nk
    gradient_E = TINY * excess(chosen_Nk, len(offsets_E)).to(offsets_E.dtype)
    found: Tensor = _Counted.apply(weights_Nk, offsets_E, gradient_E)
    return found
