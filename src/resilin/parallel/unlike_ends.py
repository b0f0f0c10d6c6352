"""A weight that two stages have, each divided among its own ranks: both come to one sum of its gradient.

The ends of an elastic pipeline have as many ranks as they happen to have, so what a rank of one owns is spread over
several of the other: what goes where is found by intersecting intervals, as for everything that is sliced anew.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from resilin.parallel.exchange import swap
from resilin.parallel.group import Group

Interval = tuple[int, int]
"""First element of a parameter, and one past the last."""


@dataclass(frozen=True)
class UnlikeEnds:
    """How the ranks of both ends come to one sum.

    Attributes:
        group: the ranks of the first stage that have this part of the weight, then those of the last.
        first: how many of them are of the first stage.
        owned: by rank of the group what it owns of the weight's elements, ascending.
        in_order: whether the last stage has the whole sum; otherwise each end has a part, and the first's comes first.
        like: of the sums' dtype and device.
    """

    group: Group
    first: int
    owned: Sequence[Sequence[Interval]]
    in_order: bool
    like: Tensor

    @property
    def given(self) -> bool:
        """Whether this rank has nothing of the sum by itself."""
        return self.in_order and self.group.index < self.first

    def agree(self, mine: Sequence[Tensor]) -> None:
        """Make what this rank owns of the sum that of both ends. All ranks of the group call together.

        Args:
            mine: by interval that this rank owns what it has of the sum; filled.
        """
        flat = torch.cat([part.reshape(-1) for part in mine]) if mine else self.like.new_empty(0)
        if not self.in_order:
            theirs = self._pass(flat, upward=True)
            if self.group.index >= self.first:
                flat = theirs.add_(flat)
        summed = self._pass(flat, upward=False) if self.group.index < self.first else flat
        if self.group.index >= self.first:
            self._pass(flat, upward=False)
        for part, value in zip(mine, summed.split([part.numel() for part in mine]), strict=True):
            part.view(-1).copy_(value)

    def _pass(self, flat: Tensor, *, upward: bool) -> Tensor:
        """What one end has goes to who owns it at the other; (elements owned,), of no meaning at a sender."""
        me, size = self.group.index, self.group.size
        sends, others = (me < self.first) is upward, range(size)
        gives = [self._common[rank] if sends and self._is_opposite(rank) else [] for rank in others]
        gets = [self._common[rank] if not sends and self._is_opposite(rank) else [] for rank in others]
        wanted = [flat[begin:end] for each in gives for begin, end in each]
        sent = torch.cat(wanted) if wanted else self.like.new_empty(0)
        counts = [[sum(end - begin for begin, end in each) for each in side] for side in (gets, gives)]
        received = self.like.new_empty(sum(counts[0]))
        swap(received, sent, counts[0], counts[1], self.group)()
        found, at = torch.empty_like(flat), 0
        for begin, end in (one for each in gets for one in each):
            found[begin:end] = received[at : at + end - begin]
            at += end - begin
        return found

    def _is_opposite(self, rank: int) -> bool:
        return (rank < self.first) is not (self.group.index < self.first)

    @cached_property
    def _common(self) -> list[list[Interval]]:
        """By rank what both own, as intervals of what this rank owns, counted from its first element; ascending."""
        found = []
        for theirs in self.owned:
            common, at = [], 0
            for begin, end in self.owned[self.group.index]:
                for low, high in ((max(begin, b), min(end, e)) for b, e in theirs):
                    if low < high:
                        common.append((at + low - begin, at + high - begin))
                at += end - begin
            found.append(common)
        return found
