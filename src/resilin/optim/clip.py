"""The global norm of all gradients, and scaling by it.

Floating-point sums depend on their order, and a gradient may be spread over any number of ranks. So the order is that
of virtual shards (`resilin.layout.dealing`): each is added up by itself, in whole, by whoever owns it, and the sums are
added in the order of parameters and shards.

Shapes: P parameters, V virtual shards of each, S of them in a run.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from resilin.layout.cuts import intervals
from resilin.layout.dealing import ALIGN, VIRTUAL_SHARDS


@lru_cache(maxsize=4096)
def shard_edges(elements: int, shards: int = VIRTUAL_SHARDS) -> tuple[int, ...]:
    """(V + 1,) where virtual shards of so many elements begin, and where the last one ends."""
    low, high = intervals(np.array(elements), shards, "even", align=ALIGN)
    return (*low.tolist(), int(high[-1]))


@lru_cache(maxsize=4096)
def _stretches(elements: int, shards: int, first: int, stop: int) -> tuple[tuple[int, int, int], ...]:
    """(begin, end, shards) of stretches of shards of one length."""
    edges, found = shard_edges(elements, shards), []
    shard = first
    while shard < stop:
        length, after = edges[shard + 1] - edges[shard], shard + 1
        while after < stop and edges[after + 1] - edges[after] == length:
            after += 1
        found.append((edges[shard], edges[after], after - shard))
        shard = after
    return tuple(found)


def shard_norms(
    run: Tensor, elements: int, first: int = 0, stop: int = VIRTUAL_SHARDS, *, shards: int = VIRTUAL_SHARDS
) -> list[Tensor]:
    """The norms of the virtual shards `first` to `stop` (exclusive) of a tensor: (S,) together, in pieces.

    Norms are taken in float32 (float64 where that is the format), each over one shard.

    Args:
        run: the elements of those shards, flat.
        elements: of the whole tensor.
        first: the first of the shards.
        stop: one past the last.
        shards: how many the whole tensor has.
    """
    dtype = torch.float64 if run.dtype == torch.float64 else torch.float32
    begin = shard_edges(elements, shards)[first]
    return [
        torch.linalg.vector_norm(run[low - begin : high - begin].view(count, -1), dim=1, dtype=dtype)
        if high > low
        else torch.zeros(count, dtype=dtype, device=run.device)
        for low, high, count in _stretches(elements, shards, first, stop)
    ]


def global_norm(grads: Sequence[Tensor]) -> Tensor:
    """The Euclidean norm of all gradients together, 0-d float64; the order of additions is told above."""
    if not grads:
        return torch.zeros((), dtype=torch.float64)
    flat = [(grad.to_dense() if grad.is_sparse else grad).reshape(-1) for grad in grads]
    pieces = [norm for grad in flat for norm in shard_norms(grad, grad.numel())]
    return total_norm(torch.cat(pieces).double().square())


def total_norm(squares: Tensor) -> Tensor:
    """The norm, 0-d float64, from the squared norms, float64, of all shards of all parameters, in their order."""
    return squares.sum().sqrt()


def clip_factor(norm: float, max_norm: float) -> float:
    """What gradients of global norm `norm` are multiplied by so that it is at most `max_norm` (0: no limit)."""
    if max_norm < 0:
        raise ValueError(f"max_norm is {max_norm}; it should be positive, or 0 for no clipping")
    return max_norm / norm if 0 < max_norm < norm else 1.0
