"""All experts' feed-forwards and their weighted sum as one operation on CPUs, with a backward pass of its own.

Written out with torch's operations, a mixture of experts spends as long on memory as on products: every gather, every
activation and every factor writes a tensor of R rows, whose pages are new each time. Here an expert's rows pass through
all steps some hundreds at a time, in buffers that stay in the processor's cache; only what the backward pass needs is
kept. Rows are added in the order of a token's choices, one thread to a token: the same bits every time.
Shapes: N tokens, k choices per token, R = N * k rows sorted by expert, E experts, D hidden size, F expert size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

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


class _Block(NamedTuple):
    """Rows of one or several experts that pass through all steps together, in parts of one expert each.

    Attributes:
        low: the first row.
        high: one past the last.
        experts: whose each part is.
        rows: of each part, at most `CHUNK`.
        first: whether a part is the first of its expert.
    """

    low: int
    high: int
    experts: list[int]
    rows: list[int]
    first: list[bool]

    def cut(self, rows_RI: Tensor) -> Sequence[Tensor]:
        """Each part's rows of the block's."""
        return (rows_RI,) if len(self.rows) == 1 else torch.split_with_sizes(rows_RI, self.rows)


def _blocks(sizes: list[int]) -> Iterator[_Block]:
    """All rows in order.

    Where parts begin and end depends on their expert's rows alone, so that its products are the same bits whichever
    experts are here.
    """
    block = _Block(0, 0, [], [], [])
    for expert, size in enumerate(sizes):
        for begun in range(0, size, CHUNK):
            rows = min(CHUNK, size - begun)
            if block.rows and block.high + rows - block.low > CHUNK:
                yield block
                block = _Block(block.high, block.high, [], [], [])
            block.experts.append(expert)
            block.rows.append(rows)
            block.first.append(begun == 0)
            block = block._replace(high=block.high + rows)
    if block.rows:
        yield block


def _each(stack: Tensor | None, dtype: torch.dtype) -> Sequence[Tensor]:
    """An expert's matrix by its number; nothing of nothing."""
    if stack is None:
        return ()
    return stack.unbind() if stack.dtype == dtype else _Widened(stack.unbind(), dtype)


class _Widened(Sequence[Tensor]):
    """Matrices in a wider format, one at a time."""

    def __init__(self, matrices: Sequence[Tensor], dtype: torch.dtype) -> None:
        self._matrices, self._dtype = matrices, dtype

    def __len__(self) -> int:
        return len(self._matrices)

    def __getitem__(self, expert: Any) -> Any:
        return self._matrices[expert].to(self._dtype)


def _products(rows_RI: Tensor, matrices: Sequence[Tensor], out_RO: Tensor, block: _Block) -> None:
    """Each part's rows times its expert's matrix."""
    for expert, rows, out in zip(block.experts, block.cut(rows_RI), block.cut(out_RO), strict=True):
        torch.mm(rows, matrices[expert], out=out)


def _add_products(rows_RI: Tensor, matrices: Sequence[Tensor], out_RO: Tensor, block: _Block) -> None:
    """The same, added to what is there."""
    for expert, rows, out in zip(block.experts, block.cut(rows_RI), block.cut(out_RO), strict=True):
        out.addmm_(rows, matrices[expert])


def _gradients(left_OR: Tensor, right_RI: Tensor, totals: Sequence[Tensor], block: _Block) -> None:
    """Adds `left @ right` of each part to its expert's total, which its first part begins."""
    lefts = (left_OR,) if len(block.rows) == 1 else torch.split_with_sizes(left_OR, block.rows, 1)
    for expert, first, left, right in zip(block.experts, block.first, lefts, block.cut(right_RI), strict=True):
        if first:
            torch.mm(left, right, out=totals[expert])
        else:
            totals[expert].addmm_(left, right)


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
        most = min(rows, CHUNK)
        x_CD, hidden_CF = x_ND.new_empty(most, x_ND.shape[1]), x_ND.new_empty(most, wide)
        held = rows if ctx.needed else most
        up_RF = x_ND.new_empty(held, wide)
        gate_RF = None if gate is None else x_ND.new_empty(held, wide)
        out_RD = x_ND.new_empty(rows, x_ND.shape[1])
        to_gate, to_up, to_down = (_each(None if one is None else one.mT, x_ND.dtype) for one in (gate, up, down))
        for block in _blocks(ctx.sizes):
            low, high = block.low, block.high
            kept = slice(low, high) if ctx.needed else slice(0, high - low)
            x, hidden, up_F = x_CD[: high - low], hidden_CF[: high - low], up_RF[kept]
            torch.index_select(x_ND, 0, token_R[low:high], out=x)
            _products(x, to_up, up_F, block)
            if gate_RF is None:
                _activate(up_F, activation, hidden)
            else:
                gate_F = gate_RF[kept]
                _products(x, to_gate, gate_F, block)
                _activate(gate_F, activation, hidden)
                hidden.mul_(up_F)
            _products(hidden, to_down, out_RD[low:high], block)
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
        most, wide = min(len(token_R), CHUNK), up.shape[1]
        x_CD, pull_CD = (x_ND.new_empty(most, x_ND.shape[1]) for _ in range(2))
        pull_CF, hidden_CF, active_CF = (x_ND.new_empty(most, wide) for _ in range(3))
        grad_RD = x_ND.new_empty(len(token_R), x_ND.shape[1]) if of_x else None
        weights_R = None if weights_Nk is None else weights_Nk.reshape(-1).index_select(0, groups.order_R)
        grad_weights_R = torch.empty_like(weights_R) if of_weights and weights_R is not None else None
        from_gate, from_up, from_down = (_each(one, x_ND.dtype) for one in (gate, up, down))
        to_grad_gate, to_grad_up, to_grad_down = (_each(one, x_ND.dtype) for one in (grad_gate, grad_up, grad_down))
        for block in _blocks(ctx.sizes):
            low, high = block.low, block.high
            count = high - low
            x, pull, pull_F = x_CD[:count], pull_CD[:count], pull_CF[:count]
            hidden, active, up_F = hidden_CF[:count], active_CF[:count], up_RF[low:high]
            activated = gate_RF[low:high] if gated else up_F
            torch.index_select(grad_ND, 0, token_R[low:high], out=pull)
            _products(pull, from_down, pull_F, block)
            _activate(activated, kind, active)
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
                        _activate(activated, kind, active)
                hidden.mul_(weight)
                pull_F.mul_(weight)
            if to_grad_down:
                _gradients(pull.t(), hidden, to_grad_down, block)
            if gated:
                torch.mul(pull_F, active, out=hidden)  # of up
                pull_F.mul_(up_F)
            else:
                hidden = pull_F
            _activate_backward(pull_F, activated, kind)  # of gate, or of up where there is none
            if to_grad_up or to_grad_gate:
                torch.index_select(x_ND, 0, token_R[low:high], out=x)
            if to_grad_up:
                _gradients(hidden.t(), x, to_grad_up, block)
            if to_grad_gate:
                _gradients(pull_F.t(), x, to_grad_gate, block)
            if grad_RD is not None:
                _products(hidden, from_up, grad_RD[low:high], block)
                if from_gate:
                    _add_products(pull_F, from_gate, grad_RD[low:high], block)
        grad_x = None if grad_RD is None else _collect(grad_RD, groups, None, ctx.choices)
        grad_weights = None
        if grad_weights_R is not None:
            grad_weights = grad_weights_R.index_select(0, groups.rank_R).view_as(weights_Nk)
        of_matrices = (
            None if grad is None else grad.to(matrix.dtype)
            for grad, matrix in ((grad_gate, gate), (grad_up, up), (grad_down, down))
        )
        return grad_x, grad_weights, *of_matrices, None, None, None


def _again(ctx: Any, grad_ND: Tensor, inputs: tuple[Tensor | None, ...]) -> tuple[Any, ...]:
    """The gradients with a graph of their own."""
    asked = [x for x, needed in zip(inputs, ctx.needs_input_grad, strict=False) if needed and x is not None]
    with torch.enable_grad():
        # Aliases, so that a tensor that is also part of another's graph is not gone through twice.
        out = ctx.written(*inputs)
    found = iter(torch.autograd.grad(out, asked, grad_ND, create_graph=True, allow_unused=True))
    return (*(next(found) if needed else None for needed in ctx.needs_input_grad[:5]), None, None, None)
