"""Which rank holds which experts of a layer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from resilin.layout import Deal, Shard
from resilin.layout.cuts import intervals
from resilin.parallel.errors import ParallelError


@dataclass(frozen=True, slots=True)
class ExpertTable:
    """The owner of every expert; ranks need not have equally many, and some may have none.

    Attributes:
        owners: (E,) by expert the rank that holds it.
        ranks: how many share the layer.
    """

    owners: tuple[int, ...]
    ranks: int

    def __post_init__(self) -> None:
        if not self.owners or not all(0 <= owner < self.ranks for owner in self.owners):
            raise ParallelError(f"a table of experts has an owner below {self.ranks} for each, not {self.owners}")

    @classmethod
    def of(cls, experts: int, ranks: int) -> ExpertTable:
        """As `Shard("ep", 0)` cuts a stacked tensor: 10 experts on 4 ranks are 3, 3, 3, 1.

        Raises:
            ParallelError: when there are more ranks than experts.
        """
        if ranks > experts:
            raise ParallelError(
                f"{experts} experts cannot be divided among {ranks} ranks: use parallel.expert of {experts} or less"
            )
        low, high = intervals(np.array(experts), ranks)
        return cls.runs((high - low).tolist())

    @classmethod
    def runs(cls, counts: Sequence[int]) -> ExpertTable:
        """Experts in order, a run of them to each rank.

        Raises:
            ParallelError: a count is below 0, or all are 0.
        """
        if not counts or min(counts) < 0 or not sum(counts):
            raise ParallelError(
                f"a table of experts has a count from 0 for each rank, and some experts: {tuple(counts)}"
            )
        return cls(tuple(rank for rank, count in enumerate(counts) for _ in range(count)), len(counts))

    @property
    def experts(self) -> int:
        """Of the layer."""
        return len(self.owners)

    @property
    def counts(self) -> tuple[int, ...]:
        """How many experts each rank holds."""
        found = Counter(self.owners)
        return tuple(found[rank] for rank in range(self.ranks))

    @property
    def most(self) -> int:
        """The largest number of experts that a rank holds."""
        return max(self.counts)

    def held(self, rank: int) -> tuple[int, ...]:
        """The experts of a rank, ascending: as its stacked tensors have them."""
        return tuple(expert for expert, owner in enumerate(self.owners) if owner == rank)

    def cut(self, axis: str = "ep") -> Shard | Deal:
        """What cuts dimension 0 of stacked tensors so."""
        if self.owners != tuple(sorted(self.owners)):
            return Deal(axis, self.owners, dim=0)
        plain = self.ranks <= self.experts and self == ExpertTable.of(self.experts, self.ranks)
        return Shard(axis, 0) if plain else Shard(axis, 0, widths=self.counts)
