"""A masked weight whose gradient goes to all of the weight, masked entries too (Bengio et al., 2013)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from resilin.models.function import PlainFunction


class _Masked(PlainFunction):
    """weight * mask; the weight's gradient is that of the product."""

    generate_vmap_rule = True

    @staticmethod
    def forward(weight: Tensor, mask: Tensor) -> Tensor:
        """Zeros of positive sign where the mask is False, whatever the weight holds there."""
        return torch.where(mask, weight, 0.0)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Nothing is kept."""

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        """The gradient as it is."""
        return grad, None


def masked(weight: Tensor, mask: Tensor) -> Tensor:
    """`weight` where `mask` is True and 0 elsewhere; backwards, every entry gets the effective weight's gradient."""
    effective: Tensor = _Masked.apply(weight, mask)
    return effective
