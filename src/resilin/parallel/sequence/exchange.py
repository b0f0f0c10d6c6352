"""Exchanges between ranks that share rows, differentiable any number of times.

Shapes: B batch, H query heads, K key heads, T tokens of one rank, R = P * T tokens of a row, P ranks, D head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from resilin.parallel.exchange import gathered, summed, swapped
from resilin.parallel.group import Group
from resilin.parallel.sequence.heads import HeadShares


class _AllToAll(torch.autograd.Function):
    """Flat runs of `given` elements to each rank, of `taken` from each; its gradient is the exchange back."""

    @staticmethod
    def forward(ctx: Any, flat: Tensor, given: Sequence[int], taken: Sequence[int], group: Group) -> Tensor:
        ctx.given, ctx.taken, ctx.group = given, taken, group
        return swapped(flat, given, taken, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _AllToAll.apply(grad, ctx.taken, ctx.given, ctx.group), None, None, None


def all_to_all(flat: Tensor, given: Sequence[int], taken: Sequence[int], group: Group) -> Tensor:
    """Runs of a flat tensor to all ranks, and theirs to this one.

    Args:
        flat: what goes to rank 0, then what goes to rank 1, ...
        given: elements for each rank.
        taken: elements from each rank.
        group: the ranks; all of them call.

    Returns:
        What rank 0 sent, then what rank 1 sent, ...
    """
    out: Tensor = _AllToAll.apply(flat, given, taken, group)
    return out


def _for_ranks(x_BHTD: Tensor, spans: Sequence[tuple[int, int]], overlap: bool) -> Sequence[Tensor]:
    """The heads for each rank; a head that goes to several has the sum of their gradients."""
    if overlap:
        return [x_BHTD[:, first:last] for first, last in spans]
    parts: Sequence[Tensor] = x_BHTD.split([last - first for first, last in spans], dim=1)
    return parts


def _to_rows(parts: Sequence[Sequence[Tensor]], counts: Sequence[int], group: Group) -> Sequence[Tensor]:
    """Exchange several tensors at once.

    Args:
        parts: of each tensor, the heads (B, n, T, D) for each rank.
        counts: heads of each tensor that this rank receives.
        group: the ranks.

    Returns:
        Of each tensor, this rank's heads over whole rows (B, n, R, D).
    """
    B, _, T, D = parts[0][0].shape
    flat = torch.cat([part.transpose(0, 1).reshape(-1) for of_rank in zip(*parts, strict=True) for part in of_rank])
    given = [sum(part.numel() for part in of_rank) for of_rank in zip(*parts, strict=True)]
    received = all_to_all(flat, given, [sum(counts) * B * T * D] * group.size, group)
    x_PHBTD = received.view(group.size, sum(counts), B, T, D)
    x_BHRD = x_PHBTD.permute(2, 1, 0, 3, 4).reshape(B, sum(counts), group.size * T, D)
    rows: Sequence[Tensor] = x_BHRD.split(list(counts), dim=1)
    return rows


def heads_to_rows(
    q_BHTD: Tensor, k_BKTD: Tensor, v_BKTD: Tensor, shares: HeadShares, group: Group
) -> tuple[Tensor, Tensor, Tensor]:
    """All heads of this rank's tokens -> this rank's heads of all tokens, one exchange where the formats agree.

    Returns:
        Queries (B, h, R, D), keys and values (B, k, R, D), in the order of the row.
    """
    spans = (shares.queries, shares.keys, shares.keys)
    heads, keys = shares.counts(group.index)
    tensors = (q_BHTD, k_BKTD, v_BKTD)
    parts = [
        _for_ranks(x, span, overlap)
        for x, span, overlap in zip(tensors, spans, (False, shares.overlap, shares.overlap), strict=True)
    ]
    counts = (heads, keys, keys)
    if q_BHTD.dtype == k_BKTD.dtype == v_BKTD.dtype:
        q, k, v = _to_rows(parts, counts, group)
    else:
        q, k, v = (_to_rows([part], [count], group)[0] for part, count in zip(parts, counts, strict=True))
    return q, k, v


def rows_to_heads(mixed_BhRD: Tensor, shares: HeadShares, group: Group) -> Tensor:
    """This rank's heads of all tokens -> all heads of this rank's tokens, (B, H, T, D)."""
    B, h, R, D = mixed_BhRD.shape
    T, P = R // group.size, group.size
    x_PhBTD = mixed_BhRD.view(B, h, P, T, D).permute(2, 1, 0, 3, 4)
    counts = [shares.counts(rank)[0] for rank in range(P)]
    flat = all_to_all(x_PhBTD.reshape(-1), [h * B * T * D] * P, [count * B * T * D for count in counts], group)
    return flat.view(sum(counts), B, T, D).transpose(0, 1)


def gather_rows(part_NBT: Tensor, group: Group) -> Tensor:
    """Some fields' tokens of every rank, (N, B, T) -> (N, B, P, T); without a gradient."""
    return gathered(part_NBT[None], 0, group).movedim(0, 2).contiguous()


def total(part: Tensor, group: Group) -> Tensor:
    """The sum of each rank's tensor; without a gradient."""
    return part.detach().clone() if group.size == 1 else summed(part.detach(), group)
