"""Linear maps and embeddings whose weights are left for `initial.py` or a loader to fill.

A weight may be stored in a narrower format than its input has (a frozen base in bfloat16): products are then computed
in the input's format, or in autocast's, and storage changes nothing but the memory.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FEW_ROWS = 16
TALL = 8  # outputs for each input from which on a weight counts as tall


class _Widened(torch.autograd.Function):
    """x W^T + b with W taken to x's format for each pass: no layer keeps a second copy for the backward pass."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
        return F.linear(x, weight_OI.to(x.dtype), bias_O)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        x, weight_OI, _ = inputs
        ctx.save_for_backward(x if weight_OI.requires_grad else None, weight_OI)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight_OI = ctx.saved_tensors
        rows = grad.reshape(-1, grad.shape[-1])
        of_x = grad @ weight_OI.to(grad.dtype) if ctx.needs_input_grad[0] else None
        of_weight = (rows.t() @ x.reshape(-1, x.shape[-1])).to(weight_OI.dtype) if ctx.needs_input_grad[1] else None
        return of_x, of_weight, rows.sum(0) if ctx.needs_input_grad[2] else None


def product(x: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """`x @ weight.T + bias`, (..., I) -> (..., O); in autocast's format, else in that of x, whatever the weight's."""
    if torch.is_autocast_enabled(x.device.type):
        return F.linear(x, weight_OI, bias_O)
    if bias_O is not None:
        bias_O = bias_O.to(x.dtype)
    if weight_OI.dtype == x.dtype:
        return F.linear(x, weight_OI, bias_O)
    if torch.compiler.is_compiling():
        return F.linear(x, weight_OI.to(x.dtype), bias_O)
    y: Tensor = _Widened.apply(x, weight_OI, bias_O)
    return y


def project(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x @ weight.T + bias`, (..., D) and (V, D) -> (..., V); quick for the few rows of a decoding step too.

    Without gradients in float32 on the CPU, a few rows meet a tall weight (the head) in another form than in
    `F.linear`: BLAS copies the weight into an order of its own unless it is the left factor.
    """
    rows = x.shape[:-1].numel()
    few = 1 < rows <= FEW_ROWS and x.device.type == "cpu" and x.dtype == weight.dtype == torch.float32
    tall = weight.shape[0] >= TALL * weight.shape[1]
    if not (few and tall) or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return product(x, weight, bias)
    y = torch.mm(weight, x.reshape(rows, x.shape[-1]).t()).t().contiguous().view(*x.shape[:-1], weight.shape[0])
    return y if bias is None else y + bias


class Linear(nn.Linear):
    """`nn.Linear` that draws nothing when made: initial weights are keyed by parameter name."""

    def reset_parameters(self) -> None:
        """Leave the memory as it is."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., I) -> (..., O)."""
        return product(x, self.weight, self.bias)


class Embedding(nn.Embedding):
    """`nn.Embedding` that draws nothing when made."""

    def reset_parameters(self) -> None:
        """Leave the memory as it is."""
