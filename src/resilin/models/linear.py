"""Linear maps and embeddings whose weights are left for `initial.py` or a loader to fill."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FEW_ROWS = 16
TALL = 8  # outputs for each input from which on a weight counts as tall


def project(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x @ weight.T + bias`, (..., D) and (V, D) -> (..., V); quick for the few rows of a decoding step too.

    Without gradients in float32 on the CPU, two things are done otherwise than in `F.linear`. One row: BLAS reads the
    weight with a single thread, so each thread gets a part (with two threads 13 to 15 GB/s instead of 9). A few
    rows and a tall weight (the head): BLAS copies the weight into an order of its own unless it is the left factor.
    """
    rows = x.shape[:-1].numel()
    special = rows <= FEW_ROWS and x.device.type == "cpu" and x.dtype == weight.dtype == torch.float32
    if not special or torch.is_grad_enabled() or torch.compiler.is_compiling() or not weight.is_contiguous():
        return F.linear(x, weight, bias)
    (outputs, inputs), threads = weight.shape, torch.get_num_threads()
    if rows == 1 and threads > 1 and outputs % threads == 0:
        parts = weight.view(threads, outputs // threads, inputs)
        y = torch.bmm(parts, x.reshape(1, inputs, 1).expand(threads, inputs, 1)).view(*x.shape[:-1], outputs)
    elif rows > 1 and outputs >= TALL * inputs:
        y = torch.mm(weight, x.reshape(rows, inputs).t()).t().contiguous().view(*x.shape[:-1], outputs)
    else:
        return F.linear(x, weight, bias)
    return y if bias is None else y + bias


class Linear(nn.Linear):
    """`nn.Linear` that draws nothing when made: initial weights are keyed by parameter name."""

    def reset_parameters(self) -> None:
        """Leave the memory as it is."""

    def forward(self, input: Tensor) -> Tensor:
        """(..., D) -> (..., V)."""
        return project(input, self.weight, self.bias)


class Embedding(nn.Embedding):
    """`nn.Embedding` that draws nothing when made."""

    def reset_parameters(self) -> None:
        """Leave the memory as it is."""
