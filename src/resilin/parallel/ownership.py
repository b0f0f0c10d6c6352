"""Who owns which elements of which parameters: ZeRO with interleaved virtual shards (ElasWave, section 6).

Every parameter is cut on its own, so that a lost owner, or a layer that moves, touches nothing else. Pure.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from resilin.layout import Cut, Deal, Only
from resilin.layout.dealing import ALIGN, VIRTUAL_SHARDS, deal
from resilin.optim.clip import shard_edges
from resilin.parallel.errors import ParallelError


@dataclass(frozen=True, slots=True)
class Run:
    """Neighbouring virtual shards of one parameter that have one owner.

    Attributes:
        parameter: its number.
        first, stop: the shards, `stop` exclusive.
        begin, end: the elements, in row-major order.
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

    @classmethod
    def of(
        cls,
        sizes: Sequence[int],
        ranks: int,
        *,
        keep_whole: Sequence[bool] = (),
        owners: tuple[int, ...] | None = None,
    ) -> Ownership:
        """Fair shares.

        Args:
            sizes: elements of each parameter.
            ranks: how many there are.
            keep_whole: which parameters cannot be cut; each goes to whom has least of those before it.
            owners: the table of the others; None: equal runs of shards.

        Raises:
            ParallelError: there are more ranks than shards.
        """
        if owners is None and ranks > VIRTUAL_SHARDS:
            raise ParallelError(
                f"{ranks} ranks cannot share the {VIRTUAL_SHARDS} virtual shards of a parameter: use sharding = fsdp"
            )
        load, whole = [0] * ranks, []
        for size, kept in zip(sizes, keep_whole or [False] * len(sizes), strict=True):
            owner = min(range(ranks), key=lambda rank: (load[rank], rank)) if kept else None
            if owner is not None:
                load[owner] += size
            whole.append(owner)
        return cls(tuple(sizes), owners or deal(VIRTUAL_SHARDS, ranks), tuple(whole), ranks)

    def runs(self, rank: int) -> list[Run]:
        """What a rank owns, in the order of parameters and elements."""
        return [run for parameter in range(len(self.sizes)) for run in self.runs_of(parameter, rank)]

    def runs_of(self, parameter: int, rank: int) -> list[Run]:
        """What a rank owns of one parameter."""
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

    def cut(self, parameter: int, axis: str) -> Cut:
        """How an axis of the mesh cuts the optimizer's states of a parameter."""
        owner = self.whole[parameter]
        if owner is not None:
            return Only(axis, (owner,))
        return Deal(axis, self.owners, rule="even", align=ALIGN)
