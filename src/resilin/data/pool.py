"""A source seen as a numbered pool of samples: what selection, re-weighting and measuring read, whatever the step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from resilin.data.errors import DataError
from resilin.nouns import Batch, Source


@runtime_checkable
class Pool(Protocol):
    """Optional on a source: its samples by number, from 0, in an order that neither seed nor step changes.

    A source made of several lays their samples end to end; `pool_parts` are the sizes of what they come from.

    Two parties share a step where samples are chosen: who chooses says which samples a step has, the pool how many
    (`slots(step)`) and how they are seen then, in what shape or random view: by an optional method `read_for(step,
    slots, samples)`, which `resilin.transforms.read_for` calls. Without it samples look in a step as `read` gives them.
    """

    @property
    def pool_parts(self) -> tuple[int, ...]:
        """Samples of each part; the pool has as many as their sum."""

    def read(self, samples: Sequence[int]) -> Batch:
        """The samples of these numbers, in this order, repeats included, as they are outside any step: in their default
        shape, without random views; slots are 0, 1, 2, ...
        """


def pool_of(source: Source, what: str) -> Pool:
    """The source as a pool.

    Raises:
        DataError: it can only be read step by step; `what` says who needs more.
    """
    if not isinstance(source, Pool):
        raise DataError(
            f"{what} needs samples by their number, which {type(source).__name__} cannot give: use a source over files "
            "or shards, or give yours `pool_parts` and `read(samples)` (resilin.data.pool)"
        )
    return source


def pool_size(pool: Pool) -> int:
    """Samples of the whole pool."""
    return sum(pool.pool_parts)


def part_of(pool: Pool, samples: NDArray[np.int64]) -> NDArray[np.int64]:
    """Which part each sample comes from."""
    return np.searchsorted(np.cumsum(pool.pool_parts), samples, side="right")


def check_samples(samples: Sequence[int], size: int) -> NDArray[np.int64]:
    """The numbers as int64.

    Raises:
        DataError: naming one that is not in [0, size).
    """
    numbers = np.fromiter(samples, np.int64, len(samples))
    wrong = numbers[(numbers < 0) | (numbers >= size)]
    if wrong.size:
        raise DataError(f"sample {int(wrong[0])} is not in the pool, whose samples are 0 to {size - 1}")
    return numbers
