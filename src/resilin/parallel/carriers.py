"""How parts of gradients and weights get from rank to rank: in messages, or through memory that all of them see.

Workers of one machine that compute on its CPUs need no messages: each packs what is for others into pages that they
have mapped, says so, and they add it up from there. Nothing is copied by the system, received or kept twice; what is
left of an exchange is the time until the last one has packed. Where pages cannot be mapped (several machines,
containers that do not see each other, systems without such memory) and on GPUs, backends carry messages.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import cache
from itertools import accumulate
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from resilin.memory.pages import Handle, Pages, PagesError
from resilin.parallel.activity import waiting
from resilin.parallel.exchange import share, swap
from resilin.parallel.group import Group
from resilin.parallel.pool import Pool

Table = Sequence[Sequence[int]]
"""By sender and receiver so many elements; none for oneself."""
Spans = Sequence[tuple[int, int]]
"""By rank the first element of its flat weights, and one past the last."""


class Carrier(Protocol):
    """Of one group; all of its ranks call together.

    Attributes:
        in_flight: so many exchanges may be under way at one time.
    """

    in_flight: int

    def room(self, table: Table) -> Tensor:
        """Memory for what this rank sends, by receiver; what was sent from it `in_flight` exchanges ago has arrived."""

    def swap(self, packed: Tensor, table: Table) -> Callable[[], list[Tensor]]:
        """Send what lies in `room`; gives what waits for what comes, by sender. It may be written to."""

    def show(self) -> None:
        """Every rank has changed its weights, and will not until `swap` was called again."""

    def weights(self, spans: Spans) -> Callable[[], list[Tensor]]:
        """Gives what waits for a part of the flat weights of each rank, its own among them."""


class Messages:
    """Over the group's backend.

    Args:
        group: the ranks.
        weights: this rank's flat weights.
    """

    in_flight = 2

    def __init__(self, group: Group, weights: Tensor) -> None:
        self._group, self._own = group, weights
        self._packed, self._received = (Pool(weights, self.in_flight) for _ in range(2))

    def room(self, table: Table) -> Tensor:
        """Memory for what this rank sends."""
        return self._packed.take(sum(table[self._group.index]))

    def swap(self, packed: Tensor, table: Table) -> Callable[[], list[Tensor]]:
        """All at once to all."""
        me = self._group.index
        gets = [row[me] for row in table]
        received = self._received.take(sum(gets))
        wait = swap(received, packed, gets, list(table[me]), self._group)

        def arrived() -> list[Tensor]:
            wait()
            return list(received.split(gets))

        return arrived

    def show(self) -> None:
        """Nobody looks before it is sent."""

    def weights(self, spans: Spans) -> Callable[[], list[Tensor]]:
        """Each rank's to all."""
        me = self._group.index
        sizes = [0 if rank == me else high - low for rank, (low, high) in enumerate(spans)]
        parts = list(self._received.take(sum(sizes)).split(sizes))
        parts[me] = self._own[slice(*spans[me])]
        wait = share(parts, self._group)

        def arrived() -> list[Tensor]:
            wait()
            return parts

        return arrived


class SharedMemory:
    """Through pages of each rank that all others have mapped.

    A rank packs into two halves of its pages in turn: whoever says that the next exchange is packed has read the last.

    Args:
        group: the ranks.
        weights: every rank's flat weights.
    """

    in_flight = 1

    def __init__(self, group: Group, weights: list[Tensor]) -> None:
        self._group, self._weights = group, weights
        self._rooms: list[Tensor] = [weights[0].new_empty(0)] * group.size
        self._number = 0

    def room(self, table: Table) -> Tensor:
        """Half of this rank's pages; larger ones are made wherever they are too small, which all ranks know."""
        needs, group = [sum(row) for row in table], self._group
        if any(2 * need > len(room) for need, room in zip(needs, self._rooms, strict=True)):
            most = max(needs)
            like = self._weights[0]
            found = _mapped_by_all(Pages.of(2 * most * like.element_size()), group)
            if found is None:
                raise PagesError("a rank cannot map the pages of another any more, as it could before")
            self._rooms = [data.view(like.dtype) for data in found]
        self._number += 1
        return self._half(group.index)[: needs[group.index]]

    def _half(self, rank: int) -> Tensor:
        half = len(self._rooms[rank]) // 2
        return self._rooms[rank][self._number % 2 * half :][:half]

    def swap(self, packed: Tensor, table: Table) -> Callable[[], list[Tensor]]:
        """What is packed stays where it is."""
        me = self._group.index
        self._say("exchanging gradients")
        found = []
        for rank, row in enumerate(table):
            begins = list(accumulate(row, initial=0))
            found.append(self._half(rank)[begins[me] : begins[me + 1]])
        return lambda: found

    def show(self) -> None:
        """All may look."""
        self._say("exchanging weights")

    def weights(self, spans: Spans) -> Callable[[], list[Tensor]]:
        """They are there."""
        parts = [weights[low:high] for weights, (low, high) in zip(self._weights, spans, strict=True)]
        return lambda: parts

    def _say(self, what: str) -> None:
        said = torch.zeros(1)
        with waiting(self._group.ranks, what):
            self._group.wait(dist.all_reduce(said, group=self._group.process_group, async_op=True))


def carrier_of(group: Group, weights: Tensor, pages: Pages | None) -> Carrier:
    """The quickest there is between the ranks of a group, which all call together.

    Args:
        group: of two or more.
        weights: this rank's flat weights.
        pages: that they begin, which another process can map; None: they are in other memory.
    """
    if pages is None or group.backend != "gloo":
        return Messages(group, weights)
    found = _mapped_by_all(pages, group)
    if found is not None:
        return SharedMemory(group, [data.view(weights.dtype) for data in found])
    if group.index == 0:
        _tell_once()
    return Messages(group, weights)


@cache
def _tell_once() -> None:
    sys.stderr.write("gradients and weights travel in messages: not all workers can map each other's memory\n")


def _mapped_by_all(pages: Pages, group: Group) -> list[Tensor] | None:
    """Every rank's pages, or None where some rank cannot map some."""
    mine = torch.tensor([0] * 5 if pages.handle is None else pages.handle.json())
    told = [torch.empty_like(mine) for _ in range(group.size)]
    with waiting(group.ranks):
        group.wait(dist.all_gather(told, mine, group=group.process_group, async_op=True))
    found, failed = [], 0
    for rank, handle in enumerate(told):
        try:
            found.append(pages.data if rank == group.index else Pages.mapped(Handle.of_json(handle.tolist())).data)
        except PagesError:
            failed = 1
    failures = torch.tensor([failed])
    with waiting(group.ranks):
        group.wait(dist.all_reduce(failures, group=group.process_group, async_op=True))
    return None if int(failures) else found
