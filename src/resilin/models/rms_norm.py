"""Root-mean-square norm with a gradient in closed form.

torch's own kernel is taken on CUDA and under torch.compile. Its CPU version is a chain of small operations whose
forward and backward passes go over memory many more times than this one.
Shapes: ... any leading dimensions, D the width normed over, N rows.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


class _RMSNormOnCPU(torch.autograd.Function):
    """With r = (mean(x**2) + eps)**-0.5, y = w r x: dx = r w g - x r**3 mean(w g x), dw = sum(g r x)."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        rsqrt = (norm * norm / x.shape[-1] + eps).rsqrt()
        return (x * rsqrt).mul_(weight_D), rsqrt

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
        x, weight_D, ctx.eps = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(x, weight_D, output[1])

    @staticmethod
    def backward(ctx, grad, _):  # type: ignore[no-untyped-def]
        x, weight_D, rsqrt = ctx.saved_tensors
        if torch.is_grad_enabled():
            # A gradient of this gradient is wanted: go through operations that have one.
            again = F.rms_norm(x, weight_D.shape, weight_D, ctx.eps)
            wanted = [part for part, needed in zip((x, weight_D), ctx.needs_input_grad, strict=False) if needed]
            parts = iter(torch.autograd.grad(again, wanted, grad, create_graph=True))
            return *(next(parts) if needed else None for needed in ctx.needs_input_grad[:2]), None
        grad_x = grad_weight = None
        product_ND = (grad * x).reshape(-1, x.shape[-1])
        # `mv`, unlike `@`, stays in float32 when the backward pass is run under autocast.
        if ctx.needs_input_grad[1]:
            grad_weight = torch.mv(product_ND.t(), rsqrt.reshape(-1))
        if ctx.needs_input_grad[0]:
            inner = torch.mv(product_ND, weight_D).view(rsqrt.shape)
            pull = inner * rsqrt**3 / -x.shape[-1]
            grad_x = (grad * weight_D).mul_(rsqrt).addcmul_(x, pull)
        return grad_x, grad_weight, None


def rms_norm(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """`weight * x / sqrt(mean(x**2) + eps)` (Zhang and Sennrich, 2019), computed in float32.

    Args:
        x: (..., D).
        weight_D: the scale.
        eps: added to the mean square.

    Returns:
        (..., D) in the dtype of `x`.
    """
    if x.device.type != "cpu" or x.dtype not in (torch.float32, torch.float64) or torch.compiler.is_compiling():
        return F.rms_norm(x, weight_D.shape, weight_D.to(x.dtype), eps)
    if not torch.is_grad_enabled():  # recording costs 90 us a call: a third of a token's time in a small model
        return _RMSNormOnCPU.forward(x, weight_D, eps)[0]
    normed: Tensor = _RMSNormOnCPU.apply(x, weight_D, eps)[0]
    return normed
