"""Clipping by the global norm of all gradients."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn


def global_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """The Euclidean norm of all gradients together, 0-d float64 on the gradients' device.

    Each tensor's norm is taken in float32 and their squares are added in float64 in the order of `parameters`, so
    the same gradients always give the same bits.
    """
    grads = [p.grad for p in parameters if p.grad is not None]
    if not grads:
        return torch.zeros((), dtype=torch.float64)
    norms = torch.stack(torch._foreach_norm(grads, 2.0))
    return norms.double().square().sum().sqrt()


def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float, units: float = 1.0) -> Tensor:
    """Divide all gradients by `units` and scale them so that their global norm is at most `max_norm`.

    One pass reads the gradients and one scales them; where the factor is 1 nothing is written.

    Args:
        parameters: their `.grad` are scaled in place; those without are skipped.
        max_norm: positive; `inf` only divides.
        units: what the gradients of a loss *sum* are divided by.

    Returns:
        0-d float64: the norm after the division and before clipping. Where it is not finite, gradients are left
        as they were: the caller does not commit the step.
    """
    if not max_norm > 0:
        raise ValueError(f"max_norm is {max_norm}; it should be positive (inf: no clipping)")
    held = [p for p in parameters if p.grad is not None]
    norm = global_norm(held) / units
    value = float(norm)
    if math.isfinite(value):
        factor = min(1.0, max_norm / value if value > 0 else 1.0) / units
        if factor != 1.0:
            torch._foreach_mul_([p.grad for p in held if p.grad is not None], factor)
    return norm
