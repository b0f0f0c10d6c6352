"""A function that takes each token by itself, a tile of tokens at a time: only its input is kept for the backward pass.

What a feed-forward makes between its two matrices is several times as wide as its input; here that exists for one tile
at a time, forward and backward, for one more forward pass (TiledMLP of Arctic Long Sequence Training, Bekman et al.,
2025). Weights' gradients are added up over tiles and handed over once, as if there had been none.

Shapes: B rows, T tokens of a row, t tokens of a tile, D width of the input.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from resilin.models.recompute import nothing_kept

Tokenwise = Callable[[Tensor], tuple[Tensor, ...]]
"""Some tokens (B, t, D) -> outputs (B, t, ...), each token's from that token."""

Tiles = int | Literal["auto"]
_LEAST = 256  # tokens of a tile that `auto` chooses: fewer would cost more in calls than they save


def tile_count(tiles: Tiles, rows: int, tokens: int, width: int) -> int:
    """How many tiles rows are cut into: those asked for, or such that one has about as many tokens as they are wide.

    Args:
        tiles: asked for, or "auto".
        rows: B.
        tokens: T, of a row.
        width: D.
    """
    return min(-(-rows * tokens // max(width, _LEAST)) if tiles == "auto" else tiles, tokens)


class _Tiled(torch.autograd.Function):
    """(function, sizes of tiles, input, parameters) -> outputs."""

    @staticmethod
    def forward(
        ctx: Any, function: Tokenwise, sizes: Sequence[int], x_BTD: Tensor, *parameters: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.save_for_backward(x_BTD, *parameters)
        ctx.function, ctx.sizes, kind = function, sizes, x_BTD.device.type
        ctx.autocast = torch.autocast(
            kind, dtype=torch.get_autocast_dtype(kind), enabled=torch.is_autocast_enabled(kind)
        )
        whole: tuple[Tensor, ...] = ()
        (B, T), at = x_BTD.shape[:2], 0
        with torch.no_grad():
            for x_BtD in x_BTD.split(list(sizes), dim=1):
                parts = function(x_BtD)
                if not whole:
                    whole = tuple(part.new_empty(B, T, *part.shape[2:]) for part in parts)
                for target, part in zip(whole, parts, strict=True):
                    target[:, at : at + part.shape[1]] = part
                at += x_BtD.shape[1]
        return whole

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        x_BTD, *parameters = ctx.saved_tensors
        wanted = list(ctx.needs_input_grad[2:])
        with ctx.autocast:
            if torch.is_grad_enabled():  # a gradient of this gradient is wanted: all tokens at once, with a graph
                return None, None, *_gradients(ctx.function, x_BTD, parameters, wanted, grads, create_graph=True)
            total: list[Tensor | None] = [None] * len(wanted)
            if wanted[0]:
                total[0] = torch.empty_like(x_BTD)
            at = 0
            for tile, x_BtD in enumerate(x_BTD.split(list(ctx.sizes), dim=1)):
                part = slice(at, at + x_BtD.shape[1])
                at = part.stop
                own = x_BtD.detach().requires_grad_(wanted[0])
                with torch.enable_grad():
                    found = _gradients(ctx.function, own, parameters, wanted, [grad[:, part] for grad in grads])
                if total[0] is not None:
                    total[0][:, part] = found[0]
                for number, grad in enumerate(found[1:], start=1):
                    so_far = total[number]
                    if so_far is None or grad is None:
                        total[number] = grad
                    elif tile == 1:  # the first tile's may be a view of what was given
                        total[number] = so_far + grad
                    else:
                        so_far.add_(grad)
        return None, None, *total


def _gradients(
    function: Tokenwise,
    x_BtD: Tensor,
    parameters: Sequence[Tensor],
    wanted: Sequence[bool],
    grads: Sequence[Tensor],
    *,
    create_graph: bool = False,
) -> list[Any]:
    """The gradients of the input and the parameters, None where none is wanted."""
    inputs = [tensor for tensor, need in zip((x_BtD, *parameters), wanted, strict=True) if need]
    outputs = function(x_BtD)
    pairs = [(out, grad) for out, grad in zip(outputs, grads, strict=True) if out.requires_grad]
    found = iter(
        torch.autograd.grad(
            [out for out, _ in pairs], inputs, [grad for _, grad in pairs],
            create_graph=create_graph, allow_unused=True, materialize_grads=True,
        )
    )  # fmt: skip
    return [next(found) if need else None for need in wanted]


def _draws(module: nn.Module) -> bool:
    """Whether something in it, an adapter say, draws random numbers by the place of a token among all."""
    return any(getattr(getattr(part, "settings", None), "dropout", 0.0) for part in module.modules())


def in_tiles(modules: Sequence[nn.Module], function: Tokenwise, x_BTD: Tensor, tiles: Tiles) -> tuple[Tensor, ...]:
    """The outputs of a function of each token, computed a tile at a time where there are several.

    All at once, with the same result: without gradients, compiled, under function transforms, and where a module inside
    draws random numbers.

    Args:
        modules: whose parameters the function uses.
        function: (B, t, D) -> (B, t, ...), several of them.
        x_BTD: its input.
        tiles: how many, or "auto".

    Returns:
        The outputs, (B, T, ...).
    """
    B, T, D = x_BTD.shape
    count = tile_count(tiles, B, T, D)
    if (
        count <= 1
        or not torch.is_grad_enabled()
        or torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or any(_draws(module) for module in modules)
    ):
        return function(x_BTD)
    base, more = divmod(T, count)
    sizes = [base + (number < more) for number in range(count)]
    parameters = [parameter for module in modules for parameter in module.parameters()]
    with nothing_kept():
        outputs: tuple[Tensor, ...] = _Tiled.apply(function, sizes, x_BTD, *parameters)
    return outputs
