"""Which weights a mask keeps: the N largest scores of every M consecutive inputs, or a share of each row.

Shapes: D outputs (rows), C inputs, G = C / M groups of a row. Masks are boolean; integers under `~` turn 0 and 1 into
-1 and -2, which reverses a decay unseen.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_PAIRWISE = 16
"""Up to this M, counting who is larger beats a sort."""


def n_of_m_mask(scores_DC: Tensor, n: int, m: int) -> Tensor:
    """True for the n largest of every m consecutive scores of a row; of equal ones the first.

    Where m does not divide C the row is padded with weights that do not exist: the last group keeps at most n.

    Args:
        scores_DC: not negative.
        n: kept, 1 to m.
        m: size of a group.
    """
    rows, inputs = scores_DC.shape
    missing = -inputs % m
    padded = F.pad(scores_DC, (0, missing), value=-1.0) if missing else scores_DC
    groups_DGm = padded.reshape(rows, -1, m)
    kept = _rank(groups_DGm) < n if m <= _PAIRWISE else _top(groups_DGm, n)
    return kept.reshape(rows, inputs + missing)[:, :inputs].contiguous()


def share_of_row_mask(scores_DC: Tensor, density: float) -> Tensor:
    """True for the largest round(density * C) scores of each row, at least one; of equal ones the first."""
    return _top(scores_DC, kept_of_row(scores_DC.shape[1], density))


def kept_of_row(inputs: int, density: float) -> int:
    """How many weights of a row of `inputs` an unstructured mask keeps."""
    return max(1, round(density * inputs))


def _rank(groups: Tensor) -> Tensor:
    """How many of a group (the last dimension) come before each, by size and then by place; int8."""
    size = groups.shape[-1]
    columns = groups.unbind(-1)
    ranks = [torch.zeros_like(column, dtype=torch.int8) for column in columns]
    for i in range(size):
        for j in range(i + 1, size):
            first = columns[i] >= columns[j]
            ranks[j] += first
            ranks[i] += ~first
    return torch.stack(ranks, -1)


def _top(scores: Tensor, count: int) -> Tensor:
    order = scores.argsort(dim=-1, descending=True, stable=True)
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, order[..., :count], True)
