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


def row_norms(rows: Sequence[Tensor | None]) -> list[Tensor]:
    """The norms of all virtual shards of a tensor that lies in rows, to the bit as of the tensor itself.

    Only a shard that reaches over rows is put together, and only while it is added up.

    Args:
        rows: along the tensor's first dimension, of equal sizes; None is a row of zeros.
    """
    some = next(row for row in rows if row is not None)
    size, found = some.numel(), []
    edges = shard_edges(size * len(rows))
    for shard in range(len(edges) - 1):
        low, high = edges[shard], edges[shard + 1]
        parts, zero = [], True
        for number in range(low // size, -(-high // size)):
            begin, end = max(low - number * size, 0), min(high - number * size, size)
            row, zero = rows[number], zero and rows[number] is None
            parts.append(some.new_zeros(end - begin) if row is None else row.reshape(-1)[begin:end])
        if zero:
            found.append(some.new_zeros(1, dtype=torch.promote_types(some.dtype, torch.float32)))
        else:
            whole = parts[0] if len(parts) == 1 else torch.cat(parts)
            found += shard_norms(whole, size * len(rows), shard, shard + 1)
    return found


def global_norm(grads: Sequence[Tensor | Sequence[Tensor | None]]) -> Tensor:
    """The Euclidean norm of all gradients together, 0-d float64; the order of additions is told above.

    Args:
        grads: tensors, or the rows of one (`row_norms`).
    """
    if not grads:
        return torch.zeros((), dtype=torch.float64)
    pieces: list[Tensor] = []
    for grad in grads:
        if isinstance(grad, Tensor):
            flat = (grad.to_dense() if grad.is_sparse else grad).reshape(-1)
            pieces += shard_norms(flat, flat.numel())
        else:
            pieces += row_norms(grad)
    device = pieces[0].device
    return total_norm(torch.cat([piece.to(device) for piece in pieces]).double().square())


def total_norm(squares: Tensor) -> Tensor:
    """The norm, 0-d float64, from the squared norms, float64, of all shards of all parameters, in their order."""
    return squares.sum().sqrt()


def clip_factor(norm: float, max_norm: float) -> float:
    """What gradients of global norm `norm` are multiplied by so that it is at most `max_norm` (0: no limit)."""
    if max_norm < 0:
        raise ValueError(f"max_norm is {max_norm}; it should be positive, or 0 for no clipping")
    return max_norm / norm if 0 < max_norm < norm else 1.0
