"""The global norm of all gradients, and scaling by it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def global_norm(grads: Sequence[Tensor]) -> Tensor:
    """The Euclidean norm of all gradients together, 0-d float64.

    Each tensor's norm is taken in float32 (float64 where any is float64) and the squares are added in float64 in the
    order given, so the same gradients in the same order always give the same bits.
    """
    if not grads:
        return torch.zeros((), dtype=torch.float64)
    dtype = torch.float64 if any(g.dtype == torch.float64 for g in grads) else torch.float32
    norms = torch._foreach_norm([g.to_dense() if g.is_sparse else g for g in grads], 2.0, dtype=dtype)
    return torch.stack(norms).double().square().sum().sqrt()


def clip_factor(norm: float, max_norm: float) -> float:
    """What gradients of global norm `norm` are multiplied by so that it is at most `max_norm` (0: no limit)."""
    if max_norm < 0:
        raise ValueError(f"max_norm is {max_norm}; it should be positive, or 0 for no clipping")
    return max_norm / norm if 0 < max_norm < norm else 1.0
