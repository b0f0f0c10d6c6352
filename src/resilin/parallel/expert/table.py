"""Which rank holds which experts of a layer."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from resilin.layout import Shard
from resilin.layout.cuts import intervals
from resilin.parallel.errors import ParallelError


@dataclass(frozen=True, slots=True)
class ExpertTable:
    """Experts in order, a run of them to each rank; runs need not be of one length, and may be empty.

    Attributes:
        counts: how many experts each rank holds.
    """

    counts: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.counts or min(self.counts) < 0 or not sum(self.counts):
            raise ParallelError(f"a table of experts has a count from 0 for each rank, and some experts: {self.counts}")

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
        return cls(tuple((high - low).tolist()))

    @property
    def experts(self) -> int:
        """Of the layer."""
        return sum(self.counts)

    @property
    def ranks(self) -> int:
        """How many share the layer."""
        return len(self.counts)

    @property
    def most(self) -> int:
        """The largest number of experts that a rank holds."""
        return max(self.counts)

    def run(self, rank: int) -> range:
        """The experts of a rank."""
        first = sum(self.counts[:rank])
        return range(first, first + self.counts[rank])

    def cut(self, axis: str = "ep") -> Shard:
        """What cuts dimension 0 of stacked tensors so."""
        plain = self.counts == ExpertTable.of(self.experts, self.ranks).counts if self.ranks <= self.experts else False
        return Shard(axis, 0) if plain else Shard(axis, 0, widths=self.counts)
