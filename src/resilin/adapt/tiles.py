"""The arithmetic of block adapters: sums over groups of inputs, and a weight's square tiles.

Shapes: N rows (all leading dimensions together), O outputs, I inputs, r block size, G = I / r groups of inputs,
A = O / r groups of outputs. Tile (a, c) of a weight W is W[a*r:(a+1)*r, c*r:(c+1)*r].
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def fold(x: Tensor, r: int) -> Tensor:
    """s[t] = sum of x[k] over k = t mod r: (..., I) -> (..., r); r need not divide I, and may exceed it."""
    whole = x.shape[-1] // r * r
    s = x[..., :whole].reshape(*x.shape[:-1], whole // r, r).sum(-2)
    rest = x.shape[-1] - whole
    return s + F.pad(x[..., whole:], (0, r - rest)) if rest else s


def unfold(s: Tensor, width: int) -> Tensor:
    """The transpose of `fold`: value k is s[k mod r], (..., r) -> (..., width)."""
    r = s.shape[-1]
    groups = -(-width // r)
    return s.unsqueeze(-2).expand(*s.shape[:-1], groups, r).reshape(*s.shape[:-1], groups * r)[..., :width]


def add_unfolded(x: Tensor, s: Tensor) -> Tensor:
    """`x + unfold(s)` in place and without a copy of `unfold(s)`; x (..., I) is contiguous."""
    r = s.shape[-1]
    whole = x.shape[-1] // r * r
    x[..., :whole].unflatten(-1, (whole // r, r)).add_(s.unsqueeze(-2))
    if whole < x.shape[-1]:
        x[..., whole:].add_(s[..., : x.shape[-1] - whole])
    return x


def miss_delta(block_rO: Tensor, inputs: int) -> Tensor:
    """dW[:, k] = D[k mod r, :] (O, I)."""
    return unfold(block_rO.t(), inputs)


def row_tiles(weight_OI: Tensor, r: int) -> Tensor:
    """(O, I) -> (A, r*G, r): for each row of tiles, all rows of all its tiles; a view of a contiguous weight."""
    outputs, inputs = weight_OI.shape
    return weight_OI.reshape(outputs // r, r * (inputs // r), r)


def bat_col(weight_OI: Tensor, blocks_Arr: Tensor) -> Tensor:
    """W'[a][c] = W[a][c] (I + B[a]) + B[a], the block shared along a row of tiles; exactly W where B is 0."""
    outputs, inputs = weight_OI.shape
    r = blocks_Arr.shape[-1]
    tiles = row_tiles(weight_OI, r)
    changed = torch.baddbmm(tiles, tiles, blocks_Arr).view(outputs // r, r, inputs // r, r)
    offset: Tensor = changed + blocks_Arr.unsqueeze(2)
    return offset.view(outputs, inputs)


def bat_ab(weight_OI: Tensor, left_Grr: Tensor, offset_Grr: Tensor) -> Tensor:
    """W'[a][c] = W[a][c] (I + A[c]) + B[c], the blocks shared down a column of tiles; A = B for `bat_row`."""
    outputs, inputs = weight_OI.shape
    r = left_Grr.shape[-1]
    tiles_GOr = weight_OI.reshape(outputs, inputs // r, r).transpose(0, 1)
    changed_GOr: Tensor = torch.baddbmm(tiles_GOr, tiles_GOr, left_Grr).unflatten(1, (outputs // r, r))
    return (changed_GOr + offset_Grr.unsqueeze(1)).flatten(1, 2).transpose(0, 1).reshape(outputs, inputs)


def _inverse(blocks: Tensor, weight_eps: float) -> Tensor:
    """(I + B)^-1 of every block, in float64.

    Raises:
        ValueError: a block cannot be inverted, or so badly that the weight would be lost to rounding.
    """
    whole = torch.eye(blocks.shape[-1], dtype=torch.float64, device=blocks.device) + blocks
    worst = float(torch.linalg.cond(whole).nan_to_num(nan=torch.inf).max())
    if worst * weight_eps > 0.01:
        raise ValueError(
            f"I + B is singular or nearly so (condition number {worst:.3g}): the weight cannot be computed back from "
            "the merged one; merge with keep=True, which keeps a copy of it"
        )
    inverse: Tensor = torch.linalg.inv(whole)
    return inverse


def bat_col_inverse(merged_OI: Tensor, blocks_Arr: Tensor) -> Tensor:
    """W[a][c] = (W'[a][c] - B[a]) (I + B[a])^-1 in float64, returned in the weight's dtype.

    Raises:
        ValueError: I + B[a] is singular or nearly so.
    """
    outputs, inputs = merged_OI.shape
    r, blocks = blocks_Arr.shape[-1], blocks_Arr.double()
    inverse = _inverse(blocks, torch.finfo(merged_OI.dtype).eps)
    tiles = merged_OI.double().view(outputs // r, r, inputs // r, r) - blocks.unsqueeze(2)
    return (tiles.view(outputs // r, -1, r) @ inverse).view(outputs, inputs).to(merged_OI.dtype)


def bat_ab_inverse(merged_OI: Tensor, left_Grr: Tensor, offset_Grr: Tensor) -> Tensor:
    """W[a][c] = (W'[a][c] - B[c]) (I + A[c])^-1 in float64, returned in the weight's dtype.

    Raises:
        ValueError: I + A[c] is singular or nearly so.
    """
    outputs, inputs = merged_OI.shape
    r = left_Grr.shape[-1]
    inverse = _inverse(left_Grr.double(), torch.finfo(merged_OI.dtype).eps)
    tiles = merged_OI.double().view(outputs // r, r, inputs // r, r) - offset_Grr.double().transpose(0, 1)
    back_GOr = tiles.view(outputs, inputs // r, r).transpose(0, 1) @ inverse
    return back_GOr.transpose(0, 1).reshape(outputs, inputs).to(merged_OI.dtype)


def block_diagonal(x: Tensor, blocks_Grr: Tensor) -> Tensor:
    """B[c] x_c for each group c of inputs: (..., I) -> (..., G, r)."""
    r = blocks_Grr.shape[-1]
    x_GNr = x.reshape(-1, x.shape[-1] // r, r).transpose(0, 1)
    z_GNr = torch.bmm(x_GNr, blocks_Grr.transpose(1, 2))
    return z_GNr.transpose(0, 1).reshape(*x.shape[:-1], x.shape[-1] // r, r)
