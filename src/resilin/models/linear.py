"""Linear maps and embeddings whose weights are left for `initial.py` or a loader to fill."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FEW_ROWS = 16
TALL = 8  # outputs for each input from which on a weight counts as tall


def project(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x @ weight.T + bias`, (..., D) and (V, D) -> (..., V); quick for the few rows of a decoding step too.

    Without gradients in float32 on the CPU, a few rows meet a tall weight (the head) in another form than in
    `F.linear`: BLAS copies the weight into an order of its own unless it is the left factor.
    """
    rows = x.shape[:-1].numel()
    few = 1 < rows <= FEW_ROWS and x.device.type == "cpu" and x.dtype == weight.dtype == torch.float32
    tall = weight.shape[0] >= TALL * weight.shape[1]
    if not (few and tall) or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return F.linear(x, weight, bias)
    y = torch.mm(weight, x.reshape(rows, x.shape[-1]).t()).t().contiguous().view(*x.shape[:-1], weight.shape[0])
    return y if bias is None else y + bias


class Linear(nn.Linear):
    """`nn.Linear` that draws nothing when made: initial weights are keyed by parameter name."""

    def reset_parameters(self) -> None:
        """Leave the memory as it is."""


class Embedding(nn.Embedding):
    """`nn.Embedding` that draws nothing when made."""

    def reset_parameters(self) -> None:
        """Leave the memory as it is."""
