"""Root-mean-square norm with a gradient in closed form.

torch's own kernel is taken on CUDA and under torch.compile. Its CPU version is a chain of small operations whose
forward and backward passes go over memory many more times than this one.
Shapes: ... any leading dimensions, D the width normed over, N rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from resilin.models.function import PlainFunction


def _normed(x: Tensor, weight_D: Tensor, eps: float, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The normed y and its factor r, of `_RMSNormOnCPU`."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    rsqrt = (norm * norm / x.shape[-1] + eps).rsqrt()
    return torch.mul(x, rsqrt, out=out).mul_(weight_D), rsqrt


def _pulled(
    grad: Tensor, x: Tensor, weight_D: Tensor, rsqrt: Tensor, wanted: tuple[bool, bool], out: Tensor | None = None
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients dx and dw of `_RMSNormOnCPU`, as far as they are wanted."""
    grad_x = grad_weight = None
    product_ND = (grad * x).reshape(-1, x.shape[-1])
    # `mv`, unlike `@`, stays in float32 when the backward pass is run under autocast.
    if wanted[1]:
        grad_weight = torch.mv(product_ND.t(), rsqrt.reshape(-1))
    if wanted[0]:
        inner = torch.mv(product_ND, weight_D).view(rsqrt.shape)
        pull = inner * rsqrt**3 / -x.shape[-1]
        grad_x = torch.mul(grad, weight_D, out=out).mul_(rsqrt).addcmul_(x, pull)
    return grad_x, grad_weight


class _RMSNormOnCPU(PlainFunction):
    """With r = (mean(x**2) + eps)**-0.5, y = w r x: dx = r w g - x r**3 mean(w g x), dw = sum(g r x)."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        return _normed(x, weight_D, eps)

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
        return *_pulled(grad, x, weight_D, rsqrt, ctx.needs_input_grad[:2]), None


class _PartsOnCPU(torch.autograd.Function):
    """The same of each of several parts of the width, into one tensor without putting parts together."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, eps: float, *weights: Tensor) -> Tensor:
        ctx.eps, ctx.sizes = eps, [len(weight) for weight in weights]
        out = torch.empty_like(x)
        parts = zip(x.split(ctx.sizes, -1), weights, out.split(ctx.sizes, -1), strict=True)
        factors = [_normed(part, weight, eps, into)[1] for part, weight, into in parts]
        ctx.save_for_backward(x, *weights, *factors)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        count = len(ctx.sizes)
        x, *rest = ctx.saved_tensors
        weights, factors = rest[:count], rest[count:]
        xs, grads = x.split(ctx.sizes, -1), grad.split(ctx.sizes, -1)
        if torch.is_grad_enabled():
            # A gradient of this gradient is wanted: go through operations that have one.
            again = [F.rms_norm(part, w.shape, w, ctx.eps) for part, w in zip(xs, weights, strict=True)]
            wanted = [one for one, need in zip((x, None, *weights), ctx.needs_input_grad, strict=True) if need]
            made = iter(torch.autograd.grad(torch.cat(again, -1), wanted, grad, create_graph=True))
            return tuple(next(made) if need else None for need in ctx.needs_input_grad)
        grad_x = torch.empty_like(x)
        of_weights = []
        for number, into in enumerate(grad_x.split(ctx.sizes, -1)):
            needed = (ctx.needs_input_grad[0], ctx.needs_input_grad[2 + number])
            part = (grads[number], xs[number], weights[number], factors[number])
            of_weights.append(_pulled(*part, needed, into)[1])
        return grad_x if ctx.needs_input_grad[0] else None, None, *of_weights


def _in_closed_form(x: Tensor) -> bool:
    return x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64) and not torch.compiler.is_compiling()


def rms_norm_of_parts(x: Tensor, weights: Sequence[Tensor], eps: float) -> Tensor:
    """`rms_norm` of each of several parts of the width by itself.

    In one pass over the parts; a norm of each, put together, takes up to twice as long in training on a CPU.

    Args:
        x: (..., D).
        weights: the scale of each part, as long as it is wide.
        eps: added to the mean square.

    Returns:
        (..., D), each part with the bits that `rms_norm` gives it.
    """
    plain = _in_closed_form(x) and torch.is_grad_enabled() and not torch._C._are_functorch_transforms_active()
    if plain and all(weight.dtype == x.dtype for weight in weights):
        normed: Tensor = _PartsOnCPU.apply(x, eps, *weights)
        return normed
    parts = x.split([len(weight) for weight in weights], -1)
    return torch.cat([rms_norm(part, weight, eps) for part, weight in zip(parts, weights, strict=True)], -1)


def rms_norm(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """`weight * x / sqrt(mean(x**2) + eps)` (Zhang and Sennrich, 2019), computed in float32.

    Args:
        x: (..., D).
        weight_D: the scale.
        eps: added to the mean square.

    Returns:
        (..., D) in the dtype of `x`.
    """
    if not _in_closed_form(x):
        return F.rms_norm(x, weight_D.shape, weight_D.to(x.dtype), eps)
    if not torch.is_grad_enabled():  # recording costs 90 us a call: a third of a token's time in a small model
        return _RMSNormOnCPU.forward(x, weight_D, eps)[0]
    normed: Tensor = _RMSNormOnCPU.apply(x, weight_D, eps)[0]
    return normed
