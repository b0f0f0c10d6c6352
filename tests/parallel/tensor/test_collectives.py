"""Collectives with gradients: each is the transpose of what its backward pass does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from forked import run_ranks
from torch import Tensor

from resilin.parallel.errors import ParallelError
from resilin.parallel.group import Group
from resilin.parallel.tensor import collectives as c

RANKS = 3


def value(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def run(function: Callable[[Tensor], Tensor], x: Tensor, pull: Tensor) -> tuple[Tensor, Tensor]:
    leaf = x.clone().requires_grad_()
    out = function(leaf)
    out.backward(pull)
    assert leaf.grad is not None
    return out.detach(), leaf.grad


def each(rank: int) -> None:
    """On every rank: values and gradients against what all ranks' numbers say."""
    group = Group.of()
    here = [value(seed, 2, 6, 5) for seed in range(RANKS)]  # what each rank has
    pulls = [value(10 + seed, 2, 6, 5) for seed in range(RANKS)]
    x, pull, total, pulled = here[rank], pulls[rank], sum(here), sum(pulls)
    assert isinstance(total, Tensor)
    assert isinstance(pulled, Tensor)

    out, grad = run(lambda t: c.copy_in(t, group), x, pull)
    torch.testing.assert_close((out, grad), (x, pulled))
    out, grad = run(lambda t: c.sum_out(t, group), x, pull)
    torch.testing.assert_close((out, grad), (total, pull))
    out, grad = run(lambda t: c.sum_both(t, group), x, pull)
    torch.testing.assert_close((out, grad), (total, pulled))
    out, grad = run(lambda t: c.once(t, group), x, pull)
    torch.testing.assert_close((out, grad), (x, pull if rank == 0 else 0 * pull))
    out, grad = run(lambda t: c.on_first(t, group), x, pull)
    torch.testing.assert_close((out, grad), (x if rank == 0 else 0 * x, pull if rank == 0 else 0 * pull))
    for dim in (1, -2, 0, 2):
        wide = list(x.shape)
        wide[dim] *= RANKS
        many = [value(20 + seed, *wide) for seed in range(RANKS)]
        summed = sum(many)
        assert isinstance(summed, Tensor)
        out, grad = run(lambda t, dim=dim: c.gather(t, dim, group), x, many[rank])
        torch.testing.assert_close((out, grad), (torch.cat(here, dim), summed.chunk(RANKS, dim)[rank]))
        out, grad = run(lambda t, dim=dim: c.put_together(t, dim, group), x, many[rank])
        torch.testing.assert_close((out, grad), (torch.cat(here, dim), many[rank].chunk(RANKS, dim)[rank]))
        out, grad = run(lambda t, dim=dim: c.scatter_sum(t, dim, group), many[rank], x)
        torch.testing.assert_close((out, grad), (summed.chunk(RANKS, dim)[rank], torch.cat(here, dim)))
        out, grad = run(lambda t, dim=dim: c.take_part(t, dim, group), many[rank], x)
        torch.testing.assert_close((out, grad), (many[rank].chunk(RANKS, dim)[rank], torch.cat(here, dim)))
    with pytest.raises(ParallelError, match="multiple of 3"):
        c.scatter_sum(x, 2, group)


def twice(rank: int) -> None:
    """A gradient of a gradient: that of `sum(sum_out(a * x)^3)`, the same as without ranks."""
    group, a = Group.of(), value(rank, 4)
    x = value(9, 4).requires_grad_()
    (first,) = torch.autograd.grad(c.sum_out(a * c.copy_in(x, group), group).pow(3).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    factor = sum(value(seed, 4) for seed in range(RANKS))
    torch.testing.assert_close(first.detach(), 3 * factor**3 * x.detach() ** 2)
    torch.testing.assert_close(second, 6 * factor**3 * x.detach())


def test_values_and_gradients_are_those_of_the_ranks_together() -> None:
    run_ranks(RANKS, each)


def test_gradients_have_gradients() -> None:
    run_ranks(RANKS, twice)


def test_one_rank_talks_to_nobody() -> None:
    x, group = value(0, 2, 3), Group.alone()
    functions: list[Callable[[Tensor], Any]] = [
        lambda t: c.copy_in(t, group),
        lambda t: c.sum_out(t, group),
        lambda t: c.gather(t, 1, group),
        lambda t: c.scatter_sum(t, 1, group),
        lambda t: c.put_together(t, 1, group),
        lambda t: c.take_part(t, 1, group),
    ]
    for function in functions:
        assert function(x) is x
