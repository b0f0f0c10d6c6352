"""How parts of gradients and weights get from rank to rank: in messages, or through memory that all of them see.

Workers of one machine that compute on its CPUs need no messages: each packs what is for others into pages that they
have mapped, says so, and they add it up from there. Nothing is copied by the system, received or kept twice; what is
left of an exchange is the time until the last one has packed. Where pages cannot be mapped (several machines,
containers that do not see each other, systems without such memory) and on GPUs, backends carry messages.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Protocol

from torch import Tensor

from resilin.memory.pages import Pages
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

    Args:
        group: the ranks, which are near.
        weights: every rank's flat weights.
    """

    in_flight = 1

    def __init__(self, group: Group, weights: list[Tensor]) -> None:
        assert group.near is not None
        self._group, self._near, self._weights = group, group.near, weights

    def room(self, table: Table) -> Tensor:
        """Half of this rank's room, into which nobody looks any more."""
        like = self._weights[0]
        return self._near.room(sum(table[self._group.index]) * like.element_size()).view(like.dtype)

    def swap(self, packed: Tensor, table: Table) -> Callable[[], list[Tensor]]:
        """What is packed stays where it is."""
        me = self._group.index
        found = []
        for data, row in zip(self._show("exchanging gradients"), table, strict=True):
            begins = [begin * packed.element_size() for begin in accumulate(row, initial=0)]
            found.append(data[begins[me] : begins[me + 1]].view(packed.dtype))
        return lambda: found

    def show(self) -> None:
        """All may look."""
        self._show("exchanging weights")

    def weights(self, spans: Spans) -> Callable[[], list[Tensor]]:
        """They are there."""
        parts = [weights[low:high] for weights, (low, high) in zip(self._weights, spans, strict=True)]
        return lambda: parts

    def _show(self, what: str) -> list[Tensor]:
        with waiting(self._group.ranks, what):
            return self._near.show()


def carrier_of(group: Group, weights: Tensor, pages: Pages | None) -> Carrier:
    """The quickest there is between the ranks of a group, which all call together.

    Args:
        group: of two or more.
        weights: this rank's flat weights.
        pages: that they begin, which another process can map; None: they are in other memory, at all ranks.
    """
    if group.near is None or pages is None:
        return Messages(group, weights)
    with waiting(group.ranks):
        found = group.near.map_all(pages)
    return Messages(group, weights) if found is None else SharedMemory(group, [d.view(weights.dtype) for d in found])
