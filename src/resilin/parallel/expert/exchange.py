"""Rows from every rank to every rank, in numbers that differ, and back the same way.

Shapes: P ranks, C kinds of rows (a rank's experts), S rows that this rank sends, R rows that it receives, D any width.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from resilin.parallel.exchange import swapped, swapped_equal
from resilin.parallel.group import Group


class Route(Protocol):
    """One pattern of rows: how many go from where to where is known and does not change."""

    def there(self, rows_SD: Tensor) -> Tensor:
        """(S, D) by receiver -> (R, D) by sender; all ranks call together."""

    def back(self, rows_RD: Tensor) -> Tensor:
        """(R, D) by sender -> (S, D) by receiver, the inverse of `there`; all ranks call together."""


class Exchange(Protocol):
    """A way to send rows among a group of ranks.

    Attributes:
        group: the ranks.
    """

    group: Group

    def route(self, counts_PC: Tensor) -> tuple[Tensor, Route]:
        """Tell every rank how many rows come; all ranks call together.

        Args:
            counts_PC: int64 on the CPU, rows of each kind for each rank.

        Returns:
            (P, C) rows of each kind from each rank, and the route for them.
        """


class FlatRoute:
    """Straight from sender to receiver.

    Args:
        group: the ranks.
        sent: rows for each.
        received: rows from each.
    """

    def __init__(self, group: Group, sent: list[int], received: list[int]) -> None:
        self.group, self.sent, self.received = group, sent, received

    def there(self, rows_SD: Tensor) -> Tensor:
        """(S, D) by receiver -> (R, D) by sender."""
        return swapped(rows_SD, self.sent, self.received, self.group)

    def back(self, rows_RD: Tensor) -> Tensor:
        """(R, D) by sender -> (S, D) by receiver."""
        return swapped(rows_RD, self.received, self.sent, self.group)


class FlatExchange:
    """One all-to-all over the whole group.

    Args:
        group: the ranks.
    """

    def __init__(self, group: Group) -> None:
        self.group = group

    def route(self, counts_PC: Tensor) -> tuple[Tensor, Route]:
        """See `Exchange.route`."""
        received_PC = swap_equal(counts_PC, self.group)
        return received_PC, FlatRoute(self.group, counts_PC.sum(1).tolist(), received_PC.sum(1).tolist())


def swap_equal(parts_PX: Tensor, group: Group) -> Tensor:
    """(P, ...): what goes to each rank -> what came from each."""
    return swapped_equal(parts_PX.to(device_of(group, parts_PX)), group).to(parts_PX.device)


def device_of(group: Group, tensor: Tensor) -> torch.device:
    """Where the group's backend wants a tensor that lies on the CPU."""
    if group.backend == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return tensor.device


class _Travel(torch.autograd.Function):
    """Rows one way; their gradient goes the other way."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, route: Route, forth: bool) -> Tensor:
        ctx.route, ctx.forth = route, forth
        return route.there(rows) if forth else route.back(rows)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _Travel.apply(grad, ctx.route, not ctx.forth), None, None


def send(rows_SD: Tensor, route: Route) -> Tensor:
    """`route.there`, differentiable any number of times."""
    came: Tensor = _Travel.apply(rows_SD, route, True)
    return came


def send_back(rows_RD: Tensor, route: Route) -> Tensor:
    """`route.back`, differentiable any number of times."""
    came: Tensor = _Travel.apply(rows_RD, route, False)
    return came
