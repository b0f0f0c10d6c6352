"""Gradients of one step, from the ranks that had parameters to those that own them now.

Blocks of a pipeline move to another stage, or experts to another worker, when a step's micro-batches are computed and
before it is taken. What was computed stays where it is; each rank that had a parameter sends every new owner its part
of each of its blocks of the canonical sum, and the owner adds them up in the order of the tree, as `Reduction` does
within a stage. So the step is the same, to the bit, and nobody waits for weights or optimizer states, which were read
before (ElasWave, section 6).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from resilin.parallel.canonical import TreeSum
from resilin.parallel.exchange import swap
from resilin.parallel.group import Group
from resilin.parallel.unlike_ends import Interval

BUCKET = 8 << 20  # elements that travel together


@dataclass(frozen=True, slots=True)
class Moved:
    """A parameter, a rank's part of it, or one of its experts, that other ranks own now.

    Attributes:
        name: of the parameter.
        givers: by rank the blocks (start, height) of micro-batches of which it has sums, ascending.
        takers: by rank what it owns of the elements, ascending.
        size: elements.
        first: by rank where they begin among all that it owns of the parameter; not there: these are all.
    """

    name: str
    givers: Mapping[int, Sequence[tuple[int, int]]]
    takers: Mapping[int, Sequence[Interval]]
    size: int
    first: Mapping[int, int] = field(default_factory=dict)

    def within(self, rank: int, owned: Sequence[Tensor]) -> Sequence[Tensor]:
        """These elements, in order.

        Args:
            rank: of a taker.
            owned: all that it owns of the parameter, in order.
        """
        if (low := self.first.get(rank)) is None:
            return owned
        high, found = low + sum(end - begin for begin, end in self.takers[rank]), []
        for part in owned:
            if high > 0 and low < part.numel():
                found.append(part.view(-1)[max(low, 0) : high])
            low, high = low - part.numel(), high - part.numel()
        return found


_Given = tuple[Moved, Sequence[Tensor | None]]


@dataclass
class Handing:
    """What is handed on in one step.

    Attributes:
        step: which.
        group: all ranks, who call together.
        moved: the same at all; a rank is nothing to those of another part of matrices.
        mine: of each of them what this rank gives: a sum for each of its blocks, or None where there is no gradient.
        like: of the gradients' dtype and device.
        used: names of which this rank was given a gradient, once it was.
    """

    step: int
    group: Group
    moved: Sequence[Moved]
    mine: Sequence[Sequence[Tensor | None]]
    like: Tensor
    used: list[str] = field(default_factory=list)

    def go(self, sums_of: Callable[[str], Sequence[Tensor]]) -> None:
        """Fill the sums of what this rank owns.

        Args:
            sums_of: by name this rank's part of the summed gradient, by interval.
        """
        self.used = []
        bucket: list[_Given] = []
        for one in zip(self.moved, self.mine, strict=True):
            bucket.append(one)
            if sum(each.size for each, _ in bucket) >= BUCKET:
                self._hand(bucket, sums_of)
                bucket = []
        if bucket:
            self._hand(bucket, sums_of)

    def _hand(self, bucket: Sequence[_Given], sums_of: Callable[[str], Sequence[Tensor]]) -> None:
        ranks, me = range(self.group.size), self.group.index
        gives = [self._given(bucket, rank) for rank in ranks]
        gets = [sum(self._values(one, rank, me) for one, _ in bucket) for rank in ranks]
        sent = [torch.cat(parts) if parts else self.like.new_empty(0) for parts in gives]
        received = self.like.new_empty(sum(gets))
        swap(received, torch.cat(sent), gets, [len(part) for part in sent], self.group)()
        coming = dict(zip(ranks, received.split(gets), strict=True))
        at = dict.fromkeys(ranks, 0)
        for one, _ in bucket:
            if not (owned := one.takers.get(me)):
                continue
            size, used = sum(end - begin for begin, end in owned), False
            blocks: list[tuple[tuple[int, int], Tensor]] = []
            for rank, theirs in one.givers.items():
                used |= bool(coming[rank][at[rank]])
                at[rank] += 1
                for block in theirs:
                    blocks.append((block, coming[rank][at[rank] : at[rank] + size]))
                    at[rank] += size
            if used:
                self._add_up(blocks, one.within(me, sums_of(one.name)))
                self.used.append(one.name)

    def _given(self, bucket: Sequence[_Given], rank: int) -> list[Tensor]:
        """What this rank sends another: of each parameter whether there is any gradient, then slices of its blocks."""
        parts: list[Tensor] = []
        for one, sums in bucket:
            if self.group.index not in one.givers or not (wanted := one.takers.get(rank)):
                continue
            parts.append(self.like.new_full((1,), any(each is not None for each in sums)))
            for each in sums:
                for begin, end in wanted:
                    nothing = self.like.new_zeros(end - begin)
                    parts.append(nothing if each is None else each.reshape(-1)[begin:end])
        return parts

    @staticmethod
    def _values(one: Moved, giver: int, taker: int) -> int:
        """How many values a rank sends another for a parameter."""
        if giver not in one.givers or not (wanted := one.takers.get(taker)):
            return 0
        return 1 + len(one.givers[giver]) * sum(end - begin for begin, end in wanted)

    @staticmethod
    def _add_up(blocks: Sequence[tuple[tuple[int, int], Tensor]], mine: Sequence[Tensor]) -> None:
        tree = TreeSum()
        for (_, height), part in sorted(blocks, key=lambda one: one[0][0]):
            tree.push([part], height)
        (total,) = tree.total()
        assert total is not None
        for part, value in zip(mine, total.split([part.numel() for part in mine]), strict=True):
            part.view(-1).copy_(value)
