"""Some samples of a pool as a pool of their own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from resilin.data.pool import Pool, check_samples, part_of
from resilin.nouns import Batch
from resilin.transforms import read_for


class Subset:
    """Samples of a pool, renumbered from 0 in the order of their old numbers, so that parts stay together.

    Args:
        pool: to take from.
        samples: which.
    """

    def __init__(self, pool: Pool, samples: NDArray[np.int64]) -> None:
        self.pool, self.samples = pool, np.sort(samples)
        counts = np.bincount(part_of(pool, self.samples), minlength=len(pool.pool_parts))
        self._parts = tuple(int(count) for count in counts)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name == "pool":
            raise AttributeError(name)
        return getattr(self.pool, name)

    @property
    def pool_parts(self) -> tuple[int, ...]:
        """Samples taken of each part of the pool."""
        return self._parts

    def read(self, samples: Sequence[int]) -> Batch:
        """Samples by their new numbers."""
        return self.pool.read(self._old(samples))

    def read_for(self, step: int, slots: Sequence[int], samples: Sequence[int]) -> Batch:
        """Samples by their new numbers, as the pool shows them in a step."""
        return read_for(self.pool, step, slots, self._old(samples))

    def _old(self, samples: Sequence[int]) -> list[int]:
        numbers: list[int] = self.samples[check_samples(samples, len(self.samples))].tolist()
        return numbers
