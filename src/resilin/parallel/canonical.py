"""The canonical reduction: one fixed order of additions, whoever computes the parts.

Floating-point addition is not associative, so "the sum of the gradients" means nothing exact until an order is
fixed. Here the leaves are the gradients of micro-batches 0, 1, 2, ... and the order is the binary tree that pairs
leaves (2i, 2i + 1), then those sums again pairwise, a node without a partner moving up unchanged. A worker that owns
an aligned block of leaves can add it on its own; any split into such blocks gives the same bits.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

Leaf = list[Tensor | None]


def _add(left: Leaf, right: Leaf) -> Leaf:
    """Elementwise sum, written into `left`'s memory; None is a zero that was never computed."""
    if len(left) != len(right):
        raise ValueError(f"two leaves of one sum have {len(left)} and {len(right)} tensors")
    both = [(a, b) for a, b in zip(left, right, strict=True) if a is not None and b is not None]
    if both:
        torch._foreach_add_([a for a, _ in both], [b for _, b in both])
    return [b if a is None else a for a, b in zip(left, right, strict=True)]


class TreeSum:
    """Adds leaves that arrive in order, holding at most one partial sum per level of the tree."""

    def __init__(self) -> None:
        self._partial: list[tuple[int, Leaf]] = []  # (height, sum), heights strictly falling

    def push(self, leaf: Leaf, height: int = 0) -> None:
        """Add the next leaf, or (height h) the finished sum of the next aligned block of 2**h leaves."""
        while self._partial and self._partial[-1][0] == height:
            leaf = _add(self._partial.pop()[1], leaf)
            height += 1
        if self._partial and self._partial[-1][0] < height:
            raise ValueError(
                f"a block of 2**{height} leaves cannot follow one of 2**{self._partial[-1][0]}: not aligned"
            )
        self._partial.append((height, leaf))

    def total(self) -> Leaf:
        """The sum of everything pushed; the tree is empty afterwards."""
        if not self._partial:
            raise ValueError("a sum of no leaves was asked for")
        total = self._partial.pop()[1]
        while self._partial:
            total = _add(self._partial.pop()[1], total)
        return total


def tree_sum(leaves: Iterable[Tensor]) -> Tensor:
    """The canonical sum of single tensors (losses, counts); the leaves themselves are left unchanged."""
    tree = TreeSum()
    for leaf in leaves:
        tree.push([leaf.clone()])
    (total,) = tree.total()
    assert total is not None
    return total


class GradientSum:
    """Sums the gradients of a step's micro-batches in canonical order.

    Call `collect` after each micro-batch's backward pass, in order. An odd leaf is accumulated by autograd straight
    onto its even neighbour, which is the same addition, so one or two micro-batches need no second buffer and n of
    them at most about log2(n).
    """

    def __init__(self, parameters: Sequence[nn.Parameter], leaves: int) -> None:
        self._parameters, self._leaves = parameters, leaves
        self._seen = 0
        self._tree = TreeSum()

    def collect(self) -> None:
        """Take the gradients just computed for the next micro-batch."""
        index, self._seen = self._seen, self._seen + 1
        if index % 2 == 0 and index + 1 < self._leaves:
            return
        self._tree.push([p.grad for p in self._parameters], height=index % 2)
        for p in self._parameters:
            p.grad = None

    def finish(self) -> list[Tensor]:
        """Put the total into `.grad` and return the gradients that exist."""
        if self._seen != self._leaves:
            raise ValueError(f"{self._seen} of {self._leaves} micro-batches were collected")
        total = self._tree.total()
        for p, grad in zip(self._parameters, total, strict=True):
            p.grad = grad
        return [grad for grad in total if grad is not None]
