"""Rows sorted by group and one matrix product per group, in both directions without atomics.

Every gather here has a gather as its gradient (the inverse permutation), so gradients are the same bits every time on
every device; `index_add` would not give that.
Shapes: N tokens, k choices per token, R = N * k rows, G groups, I input and O output width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from resilin.models.function import PlainFunction
from resilin.models.linear import product


class Groups(NamedTuple):
    """How N * k choices of a group lie when sorted by group.

    Attributes:
        order_R: the choice (token * k + place among its choices) that comes r-th.
        rank_R: the inverse: where each choice went.
        sizes_G: rows of each group.
    """

    order_R: Tensor
    rank_R: Tensor
    sizes_G: Tensor


def group_choices(chosen_Nk: Tensor, groups: int) -> Groups:
    """Sort choices by group; choices of one group keep the order of their tokens."""
    sorted_R, order_R = chosen_Nk.reshape(-1).sort(stable=True)
    rank_R = torch.empty_like(order_R)
    rank_R[order_R] = torch.arange(len(order_R), device=order_R.device)
    edges = torch.searchsorted(sorted_R, torch.arange(groups + 1, device=order_R.device))
    return Groups(order_R, rank_R, edges.diff())


class _Spread(PlainFunction):
    """Token n's row copied to each place its choices went."""

    @staticmethod
    def forward(x_NI: Tensor, order_R: Tensor, rank_R: Tensor, choices: int) -> Tensor:
        return x_NI[order_R // choices]

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
        _, order_R, rank_R, ctx.choices = inputs
        ctx.save_for_backward(order_R, rank_R)

    @staticmethod
    def backward(ctx, grad_RI):  # type: ignore[no-untyped-def]
        order_R, rank_R = ctx.saved_tensors
        gathered = _Permute.apply(grad_RI, rank_R, order_R)
        return gathered.view(-1, ctx.choices, gathered.shape[-1]).sum(1), None, None, None


class _Permute(PlainFunction):
    """Rows in another order."""

    @staticmethod
    def forward(x_RI: Tensor, order_R: Tensor, inverse_R: Tensor) -> Tensor:
        return x_RI[order_R]

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
        ctx.save_for_backward(*inputs[1:])

    @staticmethod
    def backward(ctx, grad_RI):  # type: ignore[no-untyped-def]
        order_R, inverse_R = ctx.saved_tensors
        return _Permute.apply(grad_RI, inverse_R, order_R), None, None


def spread(x_NI: Tensor, groups: Groups) -> Tensor:
    """(N, I) -> (R, I): rows sorted by group, each token's row once per choice."""
    choices = len(groups.order_R) // max(len(x_NI), 1) or 1
    rows: Tensor = _Spread.apply(x_NI, groups.order_R, groups.rank_R, choices)
    return rows


def gather(x_RI: Tensor, groups: Groups, choices: int) -> Tensor:
    """(R, I) sorted by group -> (N, k, I) by token and choice."""
    rows: Tensor = _Permute.apply(x_RI, groups.rank_R, groups.order_R)
    return rows.view(-1, choices, x_RI.shape[-1])


def grouped_linear(x_RI: Tensor, weight_GOI: Tensor, groups: Groups) -> Tensor:
    """(R, I) -> (R, O): each group's rows times its own matrix.

    One kernel on CUDA, in bfloat16 under autocast; elsewhere one product per group that has rows. The kernel takes
    widths of multiples of 16 bytes only, which those divided among ranks may not be.
    """
    if x_RI.is_cuda:
        if torch.is_autocast_enabled("cuda"):
            dtype = torch.get_autocast_dtype("cuda")
            x_RI, weight_GOI = x_RI.to(dtype), weight_GOI.to(dtype)
        if x_RI.dtype == torch.bfloat16 and not any(width % 8 for width in weight_GOI.shape[1:]):
            offsets = groups.sizes_G.cumsum(0).to(torch.int32)
            return F.grouped_mm(x_RI, weight_GOI.transpose(1, 2), offs=offsets)
    parts = x_RI.split(groups.sizes_G.tolist())
    return torch.cat([product(part, weight) for part, weight in zip(parts, weight_GOI.unbind(), strict=True)])
