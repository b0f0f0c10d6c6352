"""All experts' feed-forwards and their weighted sum as one operation on CPUs, with a backward pass of its own.

Written out with torch's operations, a mixture of experts spends as long on memory as on products: every gather, every
activation and every factor writes a tensor of R rows, whose pages are new each time. Here an expert's rows pass through
all steps some hundreds at a time, in buffers that stay in the processor's cache; only what the backward pass needs is
kept. Rows are added in the order of a token's choices, one thread to a token: the same bits every time.
Shapes: N tokens, k choices per token, R = N * k rows sorted by expert, E experts, D hidden size, F expert size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from resilin.models.grouped import Groups

CHUNK = 512
"""Rows that pass through all steps together: enough for products at full speed, few enough for a cache of 1 MiB."""
_aten = torch.ops.aten

Written = Callable[..., Tensor]
"""The same function from torch's operations, whose gradient has a gradient."""


def takes(x_ND: Tensor) -> bool:
    """Whether it can be computed here: on a CPU, in float32 or float64, with nobody watching the operations.

    Those who watch are a compiler, a transform of functions, or a mode that counts, or chooses what is computed again.
    """
    return (
        x_ND.device.type == "cpu"
        and x_ND.dtype in (torch.float32, torch.float64)
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
        and torch._C._len_torch_dispatch_stack() == 0
        and not torch._C._are_functorch_transforms_active()
    )


def mix_experts(
    x_ND: Tensor,
    weights_Nk: Tensor | None,
    matrices: tuple[Tensor | None, Tensor, Tensor],
    groups: Groups,
    activation: str,
    written: Written,
) -> Tensor:
    """(N, D) -> (N, D): what each token's experts make of it, weighted and summed. See `takes`.

    Args:
        x_ND: tokens.
        weights_Nk: of each token's choices; None: every token has one choice, which counts as it is.
        matrices: gate (E, F, D) or None, up (E, F, D) and down (E, D, F); in any format, widened to that of x.
        groups: how the choices lie when sorted by expert.
        activation: as `resilin.models.mlp.activate` knows it.
        written: `written(x_ND, weights_Nk, gate, up, down)` gives the same; asked for the gradient of a gradient.
    """
    if weights_Nk is not None:
        weights_Nk = weights_Nk.to(x_ND.dtype)
    out: Tensor = _Mixed.apply(x_ND, weights_Nk, *matrices, groups, activation, written)
    return out


def _activate(x: Tensor, kind: str, out: Tensor) -> None:
    if kind == "silu":
        _aten.silu.out(x, out=out)
    else:
        _aten.gelu.out(x, approximate="tanh" if kind == "gelu_tanh" else "none", out=out)


def _activate_backward(grad: Tensor, x: Tensor, kind: str) -> None:
    """In place in `grad`."""
    if kind == "silu":
        _aten.silu_backward.grad_input(grad, x, grad_input=grad)
    else:
        form = "tanh" if kind == "gelu_tanh" else "none"
        _aten.gelu_backward.grad_input(grad, x, approximate=form, grad_input=grad)


def _chunks(sizes: list[int]) -> Iterator[tuple[int, int, int, bool]]:
    """(expert, first row, one past the last, whether they are the expert's first)."""
    start = 0
    for expert, size in enumerate(sizes):
        for low in range(start, start + size, CHUNK):
            yield expert, low, min(low + CHUNK, start + size), low == start
        start += size


def _collect(rows_RD: Tensor, groups: Groups, weights_Nk: Tensor | None, choices: int) -> Tensor:
    """(R, D) sorted by expert -> (N, D): the sum of each token's rows, weighted where weights are given."""
    if choices == 1 and weights_Nk is None:
        return rows_RD.index_select(0, groups.rank_R)
    places_Nk = groups.rank_R.view(-1, choices)
    if weights_Nk is None:  # a factor of one takes the path of one pass over memory
        weights_Nk = rows_RD.new_ones(()).expand(places_Nk.shape).contiguous()
    return F.embedding_bag(places_Nk, rows_RD, mode="sum", per_sample_weights=weights_Nk)


class _Mixed(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx,
        x_ND: Tensor,
        weights_Nk: Tensor | None,
        gate: Tensor | None,
        up: Tensor,
        down: Tensor,
        groups: Groups,
        activation: str,
        written: Written,
    ) -> Tensor:
        rows, wide = len(groups.order_R), up.shape[1]
        ctx.choices = rows // max(len(x_ND), 1) or 1
        ctx.sizes, ctx.activation, ctx.written = groups.sizes_G.tolist(), activation, written
        ctx.needed = any(ctx.needs_input_grad)
        token_R = groups.order_R // ctx.choices
        most = min(max(ctx.sizes, default=0), CHUNK)
        x_CD, hidden_CF = x_ND.new_empty(most, x_ND.shape[1]), x_ND.new_empty(most, wide)
        held = rows if ctx.needed else most
        up_RF = x_ND.new_empty(held, wide)
        gate_RF = None if gate is None else x_ND.new_empty(held, wide)
        out_RD = x_ND.new_empty(rows, x_ND.shape[1])
        for expert, low, high, _ in _chunks(ctx.sizes):
            part = slice(low, high) if ctx.needed else slice(0, high - low)
            x, hidden = x_CD[: high - low], hidden_CF[: high - low]
            torch.index_select(x_ND, 0, token_R[low:high], out=x)
            torch.mm(x, up[expert].to(x.dtype).t(), out=up_RF[part])
            if gate is None or gate_RF is None:
                _activate(up_RF[part], activation, hidden)
            else:
                torch.mm(x, gate[expert].to(x.dtype).t(), out=gate_RF[part])
                _activate(gate_RF[part], activation, hidden)
                hidden.mul_(up_RF[part])
            torch.mm(hidden, down[expert].to(x.dtype).t(), out=out_RD[low:high])
        ctx.save_for_backward(x_ND, weights_Nk, gate, up, down, *groups, token_R, gate_RF, up_RF)
        return _collect(out_RD, groups, weights_Nk, ctx.choices)

    @staticmethod
    def backward(ctx, grad_ND: Tensor) -> tuple[Any, ...]:  # type: ignore[no-untyped-def]
        x_ND, weights_Nk, gate, up, down, *index, token_R, gate_RF, up_RF = ctx.saved_tensors
        groups = Groups(*index)
        if torch.is_grad_enabled():
            return _again(ctx, grad_ND, (x_ND, weights_Nk, gate, up, down))
        of_x, of_weights, of_gate, of_up, of_down = ctx.needs_input_grad[:5]
        grad_ND = grad_ND.contiguous()
        kind, gated = ctx.activation, gate is not None
        grad_gate, grad_up, grad_down = (
            torch.empty_like(matrix, dtype=x_ND.dtype) if asked else None
            for matrix, asked in ((gate, of_gate), (up, of_up), (down, of_down))
        )
        for matrix in (grad_gate, grad_up, grad_down):
            if matrix is not None:
                for expert, size in enumerate(ctx.sizes):
                    if not size:
                        matrix[expert].zero_()
        most, wide = min(max(ctx.sizes, default=0), CHUNK), up.shape[1]
        x_CD, pull_CD = (x_ND.new_empty(most, x_ND.shape[1]) for _ in range(2))
        pull_CF, hidden_CF, active_CF = (x_ND.new_empty(most, wide) for _ in range(3))
        grad_RD = x_ND.new_empty(len(token_R), x_ND.shape[1]) if of_x else None
        weights_R = None if weights_Nk is None else weights_Nk.reshape(-1).index_select(0, groups.order_R)
        grad_weights_R = torch.empty_like(weights_R) if of_weights and weights_R is not None else None
        for expert, low, high, first in _chunks(ctx.sizes):
            count = high - low
            x, pull, pull_F = x_CD[:count], pull_CD[:count], pull_CF[:count]
            hidden, active, up_F = hidden_CF[:count], active_CF[:count], up_RF[low:high]
            beta = 0.0 if first else 1.0
            torch.index_select(grad_ND, 0, token_R[low:high], out=pull)
            torch.mm(pull, down[expert].to(pull.dtype), out=pull_F)
            _activate(gate_RF[low:high] if gated else up_F, kind, active)
            if gated:
                torch.mul(active, up_F, out=hidden)
            else:
                hidden.copy_(active)
            if weights_R is not None:
                weight = weights_R[low:high, None]
                if grad_weights_R is not None:
                    # <pull, down hidden> is <down' pull, hidden>, so the experts' outputs need not be kept.
                    torch.sum(torch.mul(pull_F, hidden, out=active), -1, out=grad_weights_R[low:high])
                    if gated:
                        _activate(gate_RF[low:high], kind, active)
                hidden.mul_(weight)
                pull_F.mul_(weight)
            if grad_down is not None:
                _add_product(grad_down[expert], pull.t(), hidden, beta)
            if gated:
                torch.mul(pull_F, active, out=hidden)  # of up
                pull_F.mul_(up_F)
                _activate_backward(pull_F, gate_RF[low:high], kind)  # of gate
            else:
                _activate_backward(pull_F, up_F, kind)
                hidden = pull_F
            if grad_up is not None or grad_gate is not None:
                torch.index_select(x_ND, 0, token_R[low:high], out=x)
            if grad_up is not None:
                _add_product(grad_up[expert], hidden.t(), x, beta)
            if grad_gate is not None:
                _add_product(grad_gate[expert], pull_F.t(), x, beta)
            if grad_RD is not None:
                torch.mm(hidden, up[expert].to(hidden.dtype), out=grad_RD[low:high])
                if gated:
                    grad_RD[low:high].addmm_(pull_F, gate[expert].to(pull_F.dtype))
        grad_x = None if grad_RD is None else _collect(grad_RD, groups, None, ctx.choices)
        grad_weights = None
        if grad_weights_R is not None:
            grad_weights = grad_weights_R.index_select(0, groups.rank_R).view_as(weights_Nk)
        of_matrices = (
            None if grad is None else grad.to(matrix.dtype)
            for grad, matrix in ((grad_gate, gate), (grad_up, up), (grad_down, down))
        )
        return grad_x, grad_weights, *of_matrices, None, None, None


def _add_product(total: Tensor, left: Tensor, right: Tensor, beta: float) -> None:
    """Total = beta * total + left @ right."""
    if beta:
        total.addmm_(left, right)
    else:
        torch.mm(left, right, out=total)


def _again(ctx: Any, grad_ND: Tensor, inputs: tuple[Tensor | None, ...]) -> tuple[Any, ...]:
    """The gradients with a graph of their own."""
    asked = [x for x, needed in zip(inputs, ctx.needs_input_grad, strict=False) if needed and x is not None]
    with torch.enable_grad():
        # Aliases, so that a tensor that is also part of another's graph is not gone through twice.
        out = ctx.written(*inputs)
    found = iter(torch.autograd.grad(out, asked, grad_ND, create_graph=True, allow_unused=True))
    return (*(next(found) if needed else None for needed in ctx.needs_input_grad[:5]), None, None, None)
