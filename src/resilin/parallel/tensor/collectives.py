"""Collectives with the gradients that tensor parallelism needs (Shoeybi et al., 2019; Korthikanti et al., 2022).

Activations are either *whole* on every rank, cut along a dimension, or *partial*: each rank has a summand. So are
their gradients. Every function says which it takes and gives; the pairs are each other's transposes:

    copy_in      whole -> whole, gradients partial -> whole        sum_out       partial -> whole, gradients whole
    gather       cut -> whole, gradients partial -> cut            scatter_sum   partial -> cut, gradients cut -> whole
    put_together cut -> whole, gradients whole -> cut              take_part     whole -> cut, gradients cut -> whole
    sum_both     partial -> whole, gradients partial -> whole

Every rank calls the same functions in the same order, on tensors of the same sizes. In compiled code messages are
operations of their own: one follows from the other there, so their order stays. `sum_both` of two statistics do not,
and are left out of compiled code.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from resilin.models import uncompiled
from resilin.parallel.errors import ParallelError
from resilin.parallel.exchange import gathered, scattered_sum, summed
from resilin.parallel.group import Group, named


@torch.library.custom_op("resilin::summed", mutates_args=())
def _summed_op(x: Tensor, group: str) -> Tensor:
    return _summed(x, named(group))


@_summed_op.register_fake
def _(x: Tensor, group: str) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.custom_op("resilin::gathered", mutates_args=())
def _gathered_op(x: Tensor, dim: int, ranks: int, group: str) -> Tensor:
    return _gathered(x, dim, named(group)).contiguous()


@_gathered_op.register_fake
def _(x: Tensor, dim: int, ranks: int, group: str) -> Tensor:
    shape = list(x.shape)
    shape[dim] *= ranks
    return x.new_empty(shape)


@torch.library.custom_op("resilin::scattered_sum", mutates_args=())
def _scattered_sum_op(x: Tensor, dim: int, ranks: int, group: str) -> Tensor:
    return _scattered_sum(x, dim, named(group))


@_scattered_sum_op.register_fake
def _(x: Tensor, dim: int, ranks: int, group: str) -> Tensor:
    shape = list(x.shape)
    shape[dim] //= ranks
    return x.new_empty(shape)


def _summed(x: Tensor, group: Group) -> Tensor:
    if torch.compiler.is_compiling():
        message: Tensor = _summed_op(x, group.name)
        return message
    return summed(x, group)


def _gathered(x: Tensor, dim: int, group: Group) -> Tensor:
    if torch.compiler.is_compiling():
        message: Tensor = _gathered_op(x, dim % x.ndim, group.size, group.name)
        return message
    return gathered(x, dim, group)


def _scattered_sum(x: Tensor, dim: int, group: Group) -> Tensor:
    if torch.compiler.is_compiling():
        message: Tensor = _scattered_sum_op(x, dim % x.ndim, group.size, group.name)
        return message
    return scattered_sum(x, dim, group)


def _own(x: Tensor, dim: int, group: Group) -> Tensor:
    dim = dim % x.ndim
    own: Tensor = x.unflatten(dim, (group.size, -1)).select(dim, group.index)
    return own.contiguous()


class _CopyIn(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return sum_out(grad, ctx.group), None


class _SumOut(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return _summed(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return copy_in(grad, ctx.group), None


class _SumBoth(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return _summed(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return sum_both(grad, ctx.group), None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, group: Group) -> Tensor:
        ctx.dim, ctx.group = dim, group
        return _gathered(x, dim, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return scatter_sum(grad, ctx.dim, ctx.group), None, None


class _ScatterSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, group: Group) -> Tensor:
        ctx.dim, ctx.group = dim, group
        return _scattered_sum(x, dim, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return gather(grad, ctx.dim, ctx.group), None, None


class _PutTogether(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, group: Group) -> Tensor:
        ctx.dim, ctx.group = dim, group
        return _gathered(x, dim, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return take_part(grad, ctx.dim, ctx.group), None, None


class _TakePart(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, group: Group) -> Tensor:
        ctx.dim, ctx.group = dim, group
        return _own(x, dim, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return put_together(grad, ctx.dim, ctx.group), None, None


class _Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return (grad if ctx.group.index == 0 else torch.zeros_like(grad)), None


class _OnFirst(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return x.view_as(x) if group.index == 0 else torch.zeros_like(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return (grad if ctx.group.index == 0 else torch.zeros_like(grad)), None


def _divides(x: Tensor, dim: int, group: Group) -> None:
    if x.shape[dim] % group.size:
        raise ParallelError(
            f"dimension {dim} of a tensor of shape {list(x.shape)} cannot be divided among {group.size} ranks: "
            f"its length should be a multiple of {group.size}"
        )


def copy_in(x: Tensor, group: Group) -> Tensor:
    """A whole activation as it is, into a computation that gives each rank a part of its gradient."""
    out: Tensor = x if group.size == 1 else _CopyIn.apply(x, group)
    return out


def sum_out(x: Tensor, group: Group) -> Tensor:
    """The sum over the ranks, on every rank; its gradient is the same on all of them."""
    out: Tensor = x if group.size == 1 else _SumOut.apply(x, group)
    return out


def sum_both(x: Tensor, group: Group) -> Tensor:
    """The sum over the ranks, into computations of which each rank does a part: a statistic of what is cut."""
    out: Tensor = x if group.size == 1 else uncompiled.outside(_summed_both, x, group)
    return out


def _summed_both(x: Tensor, group: Group) -> Tensor:
    out: Tensor = _SumBoth.apply(x, group)
    return out


def gather(x: Tensor, dim: int, group: Group) -> Tensor:
    """The ranks' parts side by side, into a computation that gives each rank a part of their gradient.

    Args:
        x: this rank's part; all have the same size.
        dim: along which.
        group: of the ranks.
    """
    out: Tensor = x if group.size == 1 else _Gather.apply(x, dim, group)
    return out


def scatter_sum(x: Tensor, dim: int, group: Group) -> Tensor:
    """This rank's part of the sum over the ranks.

    Raises:
        ParallelError: the dimension cannot be divided evenly.
    """
    _divides(x, dim, group)
    out: Tensor = x if group.size == 1 else _ScatterSum.apply(x, dim, group)
    return out


def put_together(x: Tensor, dim: int, group: Group) -> Tensor:
    """The ranks' parts side by side, into a computation that every rank does in full."""
    out: Tensor = x if group.size == 1 else _PutTogether.apply(x, dim, group)
    return out


def take_part(x: Tensor, dim: int, group: Group) -> Tensor:
    """This rank's part of a whole activation.

    Raises:
        ParallelError: the dimension cannot be divided evenly.
    """
    _divides(x, dim, group)
    out: Tensor = x if group.size == 1 else _TakePart.apply(x, dim, group)
    return out


def once(x: Tensor, group: Group) -> Tensor:
    """A value that every rank has computed alike, with a whole gradient: the first rank alone sends it back.

    So that where gradients are partial on the way back, the sum over the ranks counts it once.
    """
    out: Tensor = x if group.size == 1 else _Once.apply(x, group)
    return out


def on_first(x: Tensor, group: Group) -> Tensor:
    """A value on the first rank, zeros on the others: a bias added to a part of a sum."""
    out: Tensor = x if group.size == 1 else _OnFirst.apply(x, group)
    return out
