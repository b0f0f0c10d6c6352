"""A frozen linear map and its adapter in one autograd function: fewer passes over activations, less of them kept.

Against autograd over the separate operations: miss keeps the folded input (N, r) and not the input (N, I); gradients
of the input are added where the base's gradient already lies; bat_col computes the changed weight again in the
backward pass, so no layer keeps a second weight. The folded or projected input is a second, hidden output, by which
gradients of gradients come out right. A weight stored in a narrower format than the products are computed in is widened
for each pass, and only what is stored is kept.

On CPUs and GPUs alike these are torch's own kernels (the thin product is added into the base's output by one addmm);
under torch.compile the separate operations are left to the compiler, which fuses the fold into one reduction.

Shapes: N rows (all leading dimensions), I inputs, O outputs, r rank; A = O / r row tiles.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from resilin.adapt.tiles import add_unfolded, bat_col, fold, row_tiles, unfold
from resilin.models.function import PlainFunction


def _may_write() -> bool:
    """Whether a tensor just made may be written into: not under torch.func, nor where a second gradient is wanted."""
    return torch._C._functorch.peek_interpreter_stack() is None


def add_product(y: Tensor, left: Tensor, right: Tensor, scale: float) -> Tensor:
    """`y + scale * left @ right`, into y's own memory where it may be; (..., O), (..., r), (r, O)."""
    rows, outputs = left.reshape(-1, left.shape[-1]), y.shape[-1]
    if _may_write() and not (torch.is_grad_enabled() and y.requires_grad):
        y.view(-1, outputs).addmm_(rows, right, alpha=scale)
        return y
    return torch.addmm(y.reshape(-1, outputs), rows, right, alpha=scale).view(*y.shape[:-1], outputs)


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


class _Miss(PlainFunction):
    """y = x W^T + b + s fold(x) D; with G the gradient of y: dD = s fold(x)^T G, dx = G W + unfold(s G D^T)."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor, weight_OI: Tensor, bias_O: Tensor | None, block_rO: Tensor, scale: float
    ) -> tuple[Tensor, Tensor]:
        folded = fold(x, block_rO.shape[0])
        return add_product(F.linear(x, weight_OI.to(x.dtype), bias_O), folded, block_rO, scale), folded

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        _, weight_OI, _, block_rO, ctx.scale = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(weight_OI, block_rO, output[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, grad_folded: Tensor | None) -> Any:
        weight_OI, block_rO, folded = ctx.saved_tensors
        if grad is None:  # only a gradient of the gradient comes this way
            grad = folded.new_zeros(*folded.shape[:-1], weight_OI.shape[0])
        of_x = of_bias = of_block = None
        if ctx.needs_input_grad[3]:
            of_block = _rows(folded).t() @ _rows(grad)
            of_block = of_block if ctx.scale == 1 else of_block * ctx.scale
        if ctx.needs_input_grad[0]:
            pull = grad @ block_rO.t()
            pull = pull if ctx.scale == 1 else pull * ctx.scale
            pull = pull if grad_folded is None else pull + grad_folded
            of_x = grad @ weight_OI.to(grad.dtype)
            in_place = _may_write() and not torch.is_grad_enabled()
            of_x = add_unfolded(of_x, pull) if in_place else of_x + unfold(pull, weight_OI.shape[1])
        if ctx.needs_input_grad[2]:
            of_bias = _rows(grad).sum(0)
        return of_x, None, of_bias, of_block, None


class _Lora(PlainFunction):
    """y = x W^T + b + s (x A^T) B^T; with G the gradient of y and P = s G B: dA = P^T x, dB = s G^T (x A^T),
    dx = G W + P A.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor, weight_OI: Tensor, bias_O: Tensor | None, down_rI: Tensor, up_Or: Tensor, scale: float
    ) -> tuple[Tensor, Tensor]:
        low = F.linear(x, down_rI)
        return add_product(F.linear(x, weight_OI.to(x.dtype), bias_O), low, up_Or.t(), scale), low

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        x, weight_OI, _, down_rI, up_Or, ctx.scale = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, weight_OI, down_rI, up_Or, output[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, grad_low: Tensor | None) -> Any:
        x, weight_OI, down_rI, up_Or, low = ctx.saved_tensors
        if grad is None:
            grad = low.new_zeros(*low.shape[:-1], weight_OI.shape[0])
        of_x = of_bias = of_down = of_up = None
        pull = grad @ up_Or
        pull = pull if ctx.scale == 1 else pull * ctx.scale
        pull = pull if grad_low is None else pull + grad_low
        if ctx.needs_input_grad[3]:
            of_down = _rows(pull).t() @ _rows(x)
        if ctx.needs_input_grad[4]:
            of_up = _rows(grad).t() @ _rows(low)
            of_up = of_up if ctx.scale == 1 else of_up * ctx.scale
        if ctx.needs_input_grad[0]:
            of_x = add_product(grad @ weight_OI.to(grad.dtype), pull, down_rI, 1.0)
        if ctx.needs_input_grad[2]:
            of_bias = _rows(grad).sum(0)
        return of_x, None, of_bias, of_down, of_up, None


class _BatCol(PlainFunction):
    """y = x W'^T + b, W' = `bat_col(W, B)`; with H = G^T x: dB[a] = sum over c of W[a][c]^T H[a][c] + H[a][c]."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight_OI: Tensor, bias_O: Tensor | None, blocks_Arr: Tensor) -> Tensor:
        return F.linear(x, bat_col(weight_OI.to(x.dtype), blocks_Arr), bias_O)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        x, weight_OI, _, blocks_Arr = inputs
        ctx.save_for_backward(x, weight_OI, blocks_Arr)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, weight_OI, blocks_Arr = ctx.saved_tensors
        of_x = of_bias = of_blocks = None
        if ctx.needs_input_grad[0]:
            of_x = grad @ bat_col(weight_OI.to(grad.dtype), blocks_Arr)
        if ctx.needs_input_grad[3]:
            r = blocks_Arr.shape[-1]
            tiles = row_tiles(_rows(grad).t() @ _rows(x), r)
            linear = torch.bmm(row_tiles(weight_OI.to(grad.dtype), r).transpose(1, 2), tiles)
            of_blocks = linear + tiles.unflatten(1, (r, -1)).sum(2)
        if ctx.needs_input_grad[2]:
            of_bias = _rows(grad).sum(0)
        return of_x, None, of_bias, of_blocks


def _cast(x: Tensor, weight_OI: Tensor, *rest: Tensor | None) -> tuple[list[Any], str]:
    """Everything in autocast's format, or else in that of x; a weight stored in a narrower one stays as it is."""
    kind = x.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
    weight_OI = weight_OI if weight_OI.dtype.itemsize < dtype.itemsize else weight_OI.to(dtype)
    return [x.to(dtype), weight_OI, *(None if t is None else t.to(dtype) for t in rest)], kind


def miss_linear(x: Tensor, weight_OI: Tensor, bias_O: Tensor | None, block_rO: Tensor, scale: float = 1.0) -> Tensor:
    """`x W^T + b + scale * fold(x) D`: (..., I) -> (..., O). The weight gets no gradient."""
    (x, weight_OI, bias_O, block_rO), kind = _cast(x, weight_OI, bias_O, block_rO)
    with torch.autocast(kind, enabled=False):
        if torch.compiler.is_compiling():
            return F.linear(x, weight_OI.to(x.dtype), bias_O) + fold(x, block_rO.shape[0]) @ block_rO * scale
        if not torch.is_grad_enabled():
            return _Miss.forward(x, weight_OI, bias_O, block_rO, scale)[0]
        y: Tensor = _Miss.apply(x, weight_OI, bias_O, block_rO, scale)[0]
        return y


def lora_linear(
    x: Tensor, weight_OI: Tensor, bias_O: Tensor | None, down_rI: Tensor, up_Or: Tensor, scale: float
) -> Tensor:
    """`x W^T + b + scale * (x A^T) B^T`: (..., I) -> (..., O). The weight gets no gradient."""
    (x, weight_OI, bias_O, down_rI, up_Or), kind = _cast(x, weight_OI, bias_O, down_rI, up_Or)
    with torch.autocast(kind, enabled=False):
        if torch.compiler.is_compiling():
            return F.linear(x, weight_OI.to(x.dtype), bias_O) + F.linear(F.linear(x, down_rI), up_Or) * scale
        if not torch.is_grad_enabled():
            return _Lora.forward(x, weight_OI, bias_O, down_rI, up_Or, scale)[0]
        y: Tensor = _Lora.apply(x, weight_OI, bias_O, down_rI, up_Or, scale)[0]
        return y


def _bat_col_few(x: Tensor, weight_OI: Tensor, bias_O: Tensor | None, blocks_Arr: Tensor) -> Tensor:
    """The same as products with the input: for fewer rows than r it costs less than changing the weight."""
    (outputs, inputs), r, weight_OI = weight_OI.shape, blocks_Arr.shape[-1], weight_OI.to(x.dtype)
    x_NI = _rows(x)
    turned: Tensor = (x_NI.reshape(-1, r) @ blocks_Arr.transpose(1, 2)).unflatten(
        1, (len(x_NI), inputs // r)
    )  # (A, N, G, r)
    through = turned.flatten(2) @ weight_OI.view(outputs // r, r, inputs).transpose(1, 2)  # (A, N, r)
    extra_ANr = through + turned.sum(2)
    y = F.linear(x, weight_OI, bias_O)
    return y + extra_ANr.transpose(0, 1).reshape(y.shape)


def bat_col_linear(x: Tensor, weight_OI: Tensor, bias_O: Tensor | None, blocks_Arr: Tensor) -> Tensor:
    """`x bat_col(W, B)^T + b`: (..., I) -> (..., O). The weight gets no gradient."""
    (x, weight_OI, bias_O, blocks_Arr), kind = _cast(x, weight_OI, bias_O, blocks_Arr)
    with torch.autocast(kind, enabled=False):
        if torch.compiler.is_compiling():
            return F.linear(x, bat_col(weight_OI.to(x.dtype), blocks_Arr), bias_O)
        if not torch.is_grad_enabled():
            few = x.shape[:-1].numel() < blocks_Arr.shape[-1]
            compute = _bat_col_few if few else _BatCol.forward
            return compute(x, weight_OI, bias_O, blocks_Arr)
        y: Tensor = _BatCol.apply(x, weight_OI, bias_O, blocks_Arr)
        return y
