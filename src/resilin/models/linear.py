"""Linear maps and embeddings whose weights are left for `initial.py` or a loader to fill.

A weight may be stored in a narrower format than its input has (a frozen base in bfloat16): products are then computed
in the input's format, or in autocast's, and storage changes nothing but the memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from resilin.models import uncompiled
from resilin.models.function import PlainFunction

_ROWS = 32  # that the order is chosen for; any number may come


class _Widened(PlainFunction):
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


class WeightGradients:
    """Gradients of weights that a backward pass has left for later (Qi et al., Zero Bubble Pipeline Parallelism, 2024).

    They are half of a backward pass's work, and nobody waits for them.
    """

    def __init__(self) -> None:
        self._work: list[tuple[Tensor, Tensor, Tensor]] = []

    def add(self, weight_OI: Tensor, grad: Tensor, x: Tensor) -> None:
        """Remember a product's (..., O) gradient and (..., I) input."""
        self._work.append((weight_OI, grad, x))

    @torch.no_grad()
    def compute(self) -> None:
        """Add them all to `.grad` of their weights."""
        for weight_OI, grad, x in self._work:
            made_OI = (grad.flatten(0, -2).t() @ x.flatten(0, -2)).to(weight_OI.dtype)
            if weight_OI.grad is None:
                weight_OI.grad = made_OI
            else:
                weight_OI.grad += made_OI
        self._work.clear()


_later: WeightGradients | None = None


@contextmanager
def weight_gradients_later(into: WeightGradients, wanted: bool = True) -> Iterator[None]:
    """Products computed while entered leave the gradients of their weights to `into`.

    Args:
        into: where they are left.
        wanted: False: nothing is changed.
    """
    global _later
    before, _later = _later, into if wanted else None
    try:
        yield
    finally:
        _later = before


def postponing() -> bool:
    """Whether products that are now computed leave the gradients of their weights for later."""
    return _later is not None


def left_as_now(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, leaving gradients of weights where they are left now, whenever it is called.

    For what is computed again in a backward pass, when nobody is inside `weight_gradients_later` any more.
    """
    later = _later
    if later is None:
        return function

    def leaving(*args: Any) -> Any:
        with weight_gradients_later(later):
            return function(*args)

    return leaving


class _Postponed(torch.autograd.Function):
    """x W^T + b whose backward pass computes the gradients of x and b only."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_OI: Tensor, bias_O: Tensor | None, later: WeightGradients) -> Tensor:
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        with torch.autocast(kind, enabled=False):
            inner = x.to(dtype)
            ctx.save_for_backward(inner, weight_OI)
            # What is saved comes back as another tensor where it is computed again: only this one has the `.grad`.
            ctx.weight, ctx.later, ctx.dtype = weight_OI, later, x.dtype
            return F.linear(inner, weight_OI.to(dtype), None if bias_O is None else bias_O.to(dtype))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight_OI = ctx.saved_tensors
        ctx.later.add(ctx.weight, grad, x)
        of_x = (grad @ weight_OI.to(grad.dtype)).to(ctx.dtype) if ctx.needs_input_grad[0] else None
        of_bias = grad.flatten(0, -2).sum(0) if ctx.needs_input_grad[2] else None
        return of_x, None, of_bias, None


def _postponed(x: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
    made: Tensor = _Postponed.apply(x, weight_OI, bias_O, _later)
    return made


def product(x: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """`x @ weight.T + bias`, (..., I) -> (..., O); in autocast's format, else in that of x, whatever the weight's."""
    if _later is not None and weight_OI.requires_grad and weight_OI.is_leaf:
        postponed: Tensor = uncompiled.outside(_postponed, x, weight_OI, bias_O)
        return postponed
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


class PackedWeight:
    """A weight kept in the order in which oneDNN multiplies with it: for many products with a few rows each.

    BLAS brings a weight into an order of its own anew for every product, which for the head of a model costs as much
    as the few rows of a decoding step themselves: packed, 2 to 64 rows take half the time or less. The order costs a
    copy of the weight, made once; later changes of the weight are not seen.

    Args:
        weight: (V, D); see `takes`.
    """

    def __init__(self, weight: Tensor) -> None:
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), _ROWS)

    @staticmethod
    def takes(weight: Tensor) -> bool:
        """Whether it can be packed: float32 on the CPU, with a torch that brings oneDNN."""
        has_operations = hasattr(torch.ops.mkldnn, "_linear_pointwise")
        return (
            weight.device.type == "cpu"
            and weight.dtype == torch.float32
            and torch.backends.mkldnn.is_available()
            and has_operations
        )

    def __call__(self, x: Tensor) -> Tensor:
        """`x @ weight.T`, (R, D) float32 -> (R, V), without gradients."""
        product: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._packed, None, "none", [], "")
        return product


class Linear(nn.Linear):
    """`nn.Linear` that draws nothing when made: initial weights are keyed by parameter name."""

    def reset_parameters(self) -> None:
        """Leave the memory as it is."""

    @property
    def can_be_cut(self) -> bool:
        """Whether it is a product and a bias and nothing else, so that parts of it can be computed."""
        return type(self) is Linear

    def added(self, bias_O: Tensor) -> Tensor:
        """What is added of the bias, or of a part of it, in this process."""
        return bias_O

    def forward(self, x: Tensor) -> Tensor:
        """(..., I) -> (..., O)."""
        return product(x, self.weight, self.bias)


class Embedding(nn.Embedding):
    """`nn.Embedding` that draws nothing when made."""

    def reset_parameters(self) -> None:
        """Leave the memory as it is."""
