"""A linear map of chains: y_i = W_i x_(<=i) + b_i, a block-lower-triangular matrix kept as one matrix for each chain.

Matrices of their own can be frozen, left out of weight decay, adapted and stored one by one. How many chains are
computed follows from the width of what comes in: no other way of saying it is needed.

Of the ways to compute it, measured on one core (64 to 2048 rows, widths 64 to 1024, two to four chains, forward and
backward): one product for each chain, with the input's gradient gathered in place, takes 0.6 to 0.9 of the time of the
dense product where that is 256 wide or more. The same products left to autograd take up to 1.3 times as long, as it
makes the input's gradient of a slice a whole tensor each time; one product with a matrix filled up with zeros is never
quicker than the dense one.

Shapes: ... any leading dimensions, I input width, O output width, N rows.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from resilin.models.chain_settings import reach_of
from resilin.models.linear import Linear, postponing


class _ChainProduct(torch.autograd.Function):
    """cat(W_i x[..., :r_i] + b_i); the gradient of x is added up in one tensor, the widest product first."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, reach: tuple[int, ...], *maps: Tensor | None) -> Tensor:
        ctx.reach = reach
        ctx.save_for_backward(x, *maps)
        return _products(x, reach, maps)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, *maps = ctx.saved_tensors
        if torch.is_grad_enabled():
            # A gradient of this gradient is wanted: go through operations that have one.
            wanted = [one for one, needed in zip((x, None, *maps), ctx.needs_input_grad, strict=True) if needed]
            made = iter(torch.autograd.grad(_products(x, ctx.reach, maps), wanted, grad, create_graph=True))
            return tuple(next(made) if needed else None for needed in ctx.needs_input_grad)
        count = len(ctx.reach)
        x_NI, grad_NO = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])
        of_x: Tensor | None = None
        of_maps: list[Tensor | None] = [None] * (2 * count)
        parts = grad_NO.split([len(weight) for weight in maps[:count]], 1)
        for chain in reversed(range(count)):
            part, weight, width = parts[chain], maps[chain], ctx.reach[chain]
            if ctx.needs_input_grad[2 + chain]:
                of_maps[chain] = part.t() @ x_NI[:, :width]
            if ctx.needs_input_grad[2 + count + chain]:
                of_maps[count + chain] = part.sum(0)
            if not ctx.needs_input_grad[0]:
                continue
            if of_x is None:
                of_x = part @ weight
            else:
                of_x[:, :width].addmm_(part, weight)
        return (None if of_x is None else of_x.view(x.shape)), None, *of_maps


def _products(x: Tensor, reach: tuple[int, ...], maps: tuple[Tensor | None, ...] | list[Tensor | None]) -> Tensor:
    """The same by operations that autograd knows; `maps` are all weights, then all biases."""
    count = len(reach)
    parts = zip(reach, maps[:count], maps[count:], strict=True)
    return torch.cat([F.linear(x[..., :width], weight, bias) for width, weight, bias in parts], -1)  # type: ignore[arg-type]


class Chained(nn.Module):
    """A module that has a part for each chain.

    Attributes:
        chains: the parts, in order.
        reach: the input's width of each scale.
    """

    chains: nn.ModuleList
    reach: tuple[int, ...]

    def scale_of(self, width: int) -> int:
        """How many chains an input of this width has.

        Raises:
            ValueError: no scale is so wide.
        """
        try:
            return self.reach.index(width) + 1
        except ValueError:
            raise ValueError(
                f"chains end at the widths {', '.join(map(str, self.reach))}, and the input is {width} wide"
            ) from None


class ChainLinear(Chained):
    """A linear map of chains.

    Args:
        inputs: width of each chain of what comes in.
        outputs: width of each chain of what goes out.
        bias: whether there are biases.
        device: of the parameters.
    """

    def __init__(
        self, inputs: tuple[int, ...], outputs: tuple[int, ...], bias: bool, device: torch.device | str | None = None
    ) -> None:
        super().__init__()
        self.reach = reach_of(inputs)
        self.chains = nn.ModuleList(
            Linear(width, size, bias=bias, device=device) for width, size in zip(self.reach, outputs, strict=True)
        )

    def forward(self, x: Tensor) -> Tensor:
        """(..., I of a scale) -> (..., O of that scale)."""
        count = self.scale_of(x.shape[-1])
        if count == 1:
            alone: Tensor = self.chains[0](x)
            return alone
        maps = self.chains[:count]
        if not self._gathers(x, maps):
            return torch.cat([one(x[..., :width]) for one, width in zip(maps, self.reach, strict=False)], -1)
        parts = [one.weight for one in maps] + [one.bias for one in maps]
        kind = x.device.type
        if torch.is_autocast_enabled(kind):
            dtype = torch.get_autocast_dtype(kind)
            x, parts = x.to(dtype), [None if part is None else part.to(dtype) for part in parts]
        made: Tensor = _ChainProduct.apply(x, self.reach[:count], *parts)
        return made

    @staticmethod
    def _gathers(x: Tensor, maps: nn.ModuleList) -> bool:
        """Whether the input's gradient is to be gathered in place: plain maps that are trained, or trained through."""
        return (
            torch.is_grad_enabled()
            and all(type(one) is Linear and one.weight.dtype == x.dtype for one in maps)
            and not torch.compiler.is_compiling()
            and not postponing()
            and not torch._C._are_functorch_transforms_active()
        )

    @property
    def weight(self) -> Tensor:
        """(O, I): the one matrix that this is, zeros where chains read nothing."""
        parts: list[Tensor] = [one.weight for one in self.chains]  # type: ignore[misc]
        return torch.cat([F.pad(part, (0, self.reach[-1] - part.shape[1])) for part in parts])


def linear_of(
    chained: bool, inputs: tuple[int, ...], outputs: tuple[int, ...], bias: bool, device: torch.device | str | None
) -> Linear | ChainLinear:
    """A linear map between widths that may be divided into chains."""
    if chained:
        return ChainLinear(inputs, outputs, bias, device)
    return Linear(sum(inputs), sum(outputs), bias=bias, device=device)
