"""Who owns which elements of which parameters: ZeRO with interleaved virtual shards (ElasWave, section 6).

Every parameter is cut on its own, so that a lost owner, or a layer that moves, touches nothing else. Pure.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from resilin.optim.clip import shard_edges


@dataclass(frozen=True, slots=True)
class Run:
    """Neighbouring virtual shards of one parameter that have one owner.

    Attributes:
        parameter: its number.
        first: the first of the shards.
        stop: one past the last.
        begin: the first element, in row-major order.
        end: one past the last.
    """

    parameter: int
    first: int
    stop: int
    begin: int
    end: int

    @property
    def size(self) -> int:
        """How many elements."""
        return self.end - self.begin


@dataclass(frozen=True)
class Ownership:
    """The owners of all elements of some parameters.

    Attributes:
        sizes: elements of each parameter.
        owners: (V,) of each virtual shard, the same for all parameters that are cut.
        whole: for each parameter its one owner, or None where it is cut: an update rule that looks at a whole matrix
            needs all of it.
        ranks: how many may own.
    """

    sizes: tuple[int, ...]
    owners: tuple[int, ...]
    whole: tuple[int | None, ...]
    ranks: int

    def runs_of(self, parameter: int, rank: int) -> list[Run]:
        """What a rank owns of one parameter, in order."""
        size, owner = self.sizes[parameter], self.whole[parameter]
        if owner is not None:
            return [Run(parameter, 0, len(self.owners), 0, size)] if owner == rank else []
        edges = shard_edges(size, len(self.owners))
        return [
            Run(parameter, first, stop, edges[first], edges[stop])
            for first, stop in self._stretches[rank]
            if edges[stop] > edges[first]
        ]

    @cached_property
    def _stretches(self) -> list[list[tuple[int, int]]]:
        """For each rank the (first, stop) of its runs in the table."""
        found: list[list[tuple[int, int]]] = [[] for _ in range(self.ranks)]
        first = 0
        for shard in range(1, len(self.owners) + 1):
            if shard == len(self.owners) or self.owners[shard] != self.owners[first]:
                found[self.owners[first]].append((first, shard))
                first = shard
        return found
