"""The canonical reduction: one fixed order of additions, whoever computes the parts.

Floating-point addition is not associative, so "the sum of the gradients" means nothing exact until an order is
fixed. Here the leaves are the gradients of micro-batches 0, 1, 2, ... and the order is the binary tree that pairs
leaves (2i, 2i + 1), then those sums again pairwise, a node without a partner moving up unchanged. A worker that owns
an aligned block of leaves can add it on its own; any split into such blocks gives the same bits.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from resilin.optim.rows import HasGradient

Leaf = list[Tensor | None]


def added(left: Leaf, right: Leaf, home: Tensor | None = None) -> Leaf:
    """Elementwise sum, written into `left`'s memory, or into that of `home`; None is a zero that was never computed."""
    if len(left) != len(right):
        raise ValueError(f"two leaves of one sum have {len(left)} and {len(right)} tensors")
    total = [b if a is None or (b is not None and b is home) else a for a, b in zip(left, right, strict=True)]
    both = [
        (t, a if t is b else b)  # of two summands either may come first
        for a, b, t in zip(left, right, total, strict=True)
        if a is not None and b is not None and t is not None
    ]
    if both:
        torch._foreach_add_([t for t, _ in both], [other for _, other in both])
    return total


class Node(NamedTuple):
    """The finished sum of an aligned block of 2**height leaves, of which the first is number `start`."""

    start: int
    height: int
    sum: Leaf


class TreeSum:
    """Adds leaves that arrive in order, holding at most one or two partial sums per level of the tree.

    Args:
        first: the number of the leaf that comes first: who has a run of leaves from the middle adds those blocks that
            are blocks of the whole tree.
        home: a tensor among the leaves whose memory is to hold every sum it is part of, and so the total.
    """

    def __init__(self, first: int = 0, home: Tensor | None = None) -> None:
        self._nodes: list[Node] = []
        self._next, self._home = first, home

    def push(self, leaf: Leaf, height: int = 0) -> None:
        """Add the next leaf, or (height h) the finished sum of the next aligned block of 2**h leaves."""
        if self._next % 2**height:
            raise ValueError(f"a block of 2**{height} leaves cannot begin at leaf {self._next}: it is not aligned")
        node = Node(self._next, height, leaf)
        self._next += 2**height
        while self._nodes:
            left = self._nodes[-1]
            if left.height != node.height or left.start % 2 ** (left.height + 1):
                break
            self._nodes.pop()
            node = Node(left.start, left.height + 1, added(left.sum, node.sum, self._home))
        self._nodes.append(node)

    def nodes(self) -> list[Node]:
        """The blocks that nothing more can be added to without other leaves; the tree is empty afterwards."""
        nodes, self._nodes = self._nodes, []
        return nodes

    def total(self) -> Leaf:
        """The sum of everything pushed, from leaf 0 on; the tree is empty afterwards."""
        nodes = self.nodes()
        if not nodes:
            raise ValueError("a sum of no leaves was asked for")
        if nodes[0].start:
            raise ValueError(f"the sum begins at leaf {nodes[0].start}: those before it are missing")
        total = nodes.pop().sum
        while nodes:
            total = added(nodes.pop().sum, total, self._home)
        return total


def blocks_of(first: int, stop: int) -> list[tuple[int, int]]:
    """(start, height) of the blocks of the tree that leaves `first` to `stop` (exclusive) make by themselves."""
    tree = TreeSum(first)
    for _ in range(first, stop):
        tree.push([])
    return [(node.start, node.height) for node in tree.nodes()]


def tree_sum(leaves: Iterable[Tensor]) -> Tensor:
    """The canonical sum of single tensors (losses, counts); the leaves themselves are left unchanged."""
    tree = TreeSum()
    for leaf in leaves:
        tree.push([leaf.clone()])
    (total,) = tree.total()
    assert total is not None
    return total


class GradientSum:
    """Sums the gradients of a run of a step's micro-batches in canonical order.

    Call `collect` after each micro-batch's backward pass, in order. An odd leaf is accumulated by autograd straight
    onto its even neighbour, which is the same addition, so one or two micro-batches need no second buffer and n of
    them at most about log2(n).

    Args:
        parameters: whose gradients are summed; or who has them in their place.
        leaves: how many micro-batches there are in the run.
        first: the number, within the step, of its first one.
    """

    def __init__(self, parameters: Sequence[HasGradient], leaves: int, first: int = 0) -> None:
        self._parameters, self._stop = parameters, first + leaves
        self._first = self._next = first
        self._tree = TreeSum(first)

    def collect(self) -> None:
        """Take the gradients just computed for the next micro-batch."""
        index, self._next = self._next, self._next + 1
        if index % 2 == 0 and index + 1 < self._stop:
            return
        self._tree.push([p.grad for p in self._parameters], height=index % 2 if index > self._first else 0)
        for p in self._parameters:
            p.grad = None

    def finish(self) -> list[Tensor]:
        """Put the total of a run that begins at 0 into `.grad` and return the gradients that exist."""
        self._check()
        total = self._tree.total()
        for p, grad in zip(self._parameters, total, strict=True):
            p.grad = grad
        return [grad for grad in total if grad is not None]

    def blocks(self) -> list[Node]:
        """The sums that other workers' are to be added to, in order; see `blocks_of`."""
        self._check()
        return self._tree.nodes()

    def _check(self) -> None:
        if self._next != self._stop:
            seen, leaves = self._next - self._first, self._stop - self._first
            raise ValueError(f"{seen} of {leaves} micro-batches were collected")
