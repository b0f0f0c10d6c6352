"""Which sample stands in which slot of which step: pure arithmetic, so resuming needs only the step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from resilin.data.errors import DataError
from resilin.data.permutation import Permutation
from resilin.keys import hash64


@dataclass(frozen=True, slots=True)
class BatchSizes:
    """Slots of each step: a first size, and sizes that hold from later steps on.

    Attributes:
        first: slots of step 0.
        changes: (step, size), steps increasing.
    """

    first: int
    changes: tuple[tuple[int, int], ...] = ()

    def __post_init__(self) -> None:
        steps = [step for step, _ in self.changes]
        if any(size < 1 for size in (self.first, *(size for _, size in self.changes))):
            raise DataError("batch sizes should be at least 1")
        if steps != sorted(set(steps)) or (steps and steps[0] < 1):
            raise DataError(f"batch_changes: steps {steps} should increase from 1 or later")

    def at(self, step: int) -> int:
        """Slots of one step."""
        size = self.first
        for start, changed in self.changes:
            if step >= start:
                size = changed
        return size

    def before(self, step: int) -> int:
        """Slots of all steps before `step`."""
        total, size, since = 0, self.first, 0
        for start, changed in self.changes:
            if step <= start:
                break
            total += (start - since) * size
            size, since = changed, start
        return total + (step - since) * size


_TABULATED = 2**16


@lru_cache(maxsize=16)
def _order(n: int, key: int) -> Callable[[NDArray[np.int64]], NDArray[np.int64]]:
    """A permutation of [0, n); a small one as a table, which is looked up faster than it is computed."""
    permutation = Permutation(n, key)
    return permutation(np.arange(n)).__getitem__ if n <= _TABULATED else permutation


@dataclass(frozen=True, slots=True)
class SampleOrder:
    """Rows in the order a run reads them: epoch after epoch, each a permutation of its own.

    Attributes:
        rows: rows in the data.
        seed: keys the permutations.
        batch_sizes: slots of each step.
        shuffle: False reads the rows in order.
        epochs: passes over the data before it ends; None never ends.
        unique_rows: use only this many rows, drawn once by the seed (a smaller draw is part of a larger one).
    """

    rows: int
    seed: int
    batch_sizes: BatchSizes
    shuffle: bool = True
    epochs: int | None = None
    unique_rows: int | None = None

    @property
    def epoch_length(self) -> int:
        """Samples of one pass."""
        return self.rows if self.unique_rows is None else min(self.rows, self.unique_rows)

    @property
    def total(self) -> int | None:
        """Samples before the data end, or None."""
        return None if self.epochs is None else self.epochs * self.epoch_length

    def slots(self, step: int) -> int:
        """Slots of a step; fewer in the last one, 0 after the end."""
        size = self.batch_sizes.at(step)
        return size if self.total is None else max(0, min(size, self.total - self.batch_sizes.before(step)))

    def epoch(self, step: int) -> float:
        """Passes over the data finished before `step`."""
        return self.batch_sizes.before(step) / self.epoch_length

    def row_of(self, step: int, slots: Sequence[int]) -> NDArray[np.int64]:
        """The row each slot reads: int64, one for each of `slots`.

        Raises:
            DataError: for a slot the step does not have, or a step after the last.
        """
        slots_B = np.fromiter(slots, np.int64, len(slots))
        size = self.slots(step)
        if step < 0 or (slots_B.size and (slots_B.min() < 0 or slots_B.max() >= size)):
            if size == 0:
                raise DataError(f"step {step}: the data ended: {self.epochs} epochs of {self.epoch_length} samples")
            raise DataError(f"step {step} has slots 0 to {size - 1}; asked for {slots_B.tolist()}")
        samples = self.batch_sizes.before(step) + slots_B
        epochs, places = samples // self.epoch_length, samples % self.epoch_length
        if self.shuffle:
            for epoch in sorted(set(epochs.tolist())):
                mine = epochs == epoch
                order = _order(self.epoch_length, hash64(self.seed, "epoch", epoch))
                places[mine] = order(places[mine])
        return self.row_of_sample(places)

    def row_of_sample(self, samples: NDArray[np.int64]) -> NDArray[np.int64]:
        """The row of each sample of the pool, numbered from 0 to `epoch_length` - 1."""
        if self.epoch_length == self.rows:
            return samples
        return _order(self.rows, hash64(self.seed, "unique rows"))(samples)
