"""Counting elements: every one is somewhere, none more often than was declared."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from resilin.layout.boxes import distinct, overlaps
from resilin.layout.errors import LayoutError
from resilin.layout.holdings import Holdings
from resilin.layout.layout import Layout
from resilin.layout.region import Region, missing

_MOST_CELLS = 1 << 24


@dataclass(frozen=True)
class Count:
    """How often the elements of one tensor are held.

    Attributes:
        least: the copies of the rarest element; 0: some are nowhere.
        most: the copies of the commonest.
    """

    least: int
    most: int


def count(held: Holdings) -> Count:
    """How often each element is held, over all places."""
    if held.numel == 0:
        return Count(1, 1)
    if not len(held):
        return Count(0, 0)
    boxes, number = distinct(held.boxes)
    copies = np.bincount(number, minlength=len(boxes))
    pairs, _, _ = overlaps(boxes, boxes)
    if len(pairs) == len(boxes):  # each overlaps itself only: no two different boxes touch
        covered = int(boxes.numel.sum())
        return Count(int(copies.min()) if covered == held.numel else 0, int(copies.max()))
    return _count_cells(held)


def _count_cells(held: Holdings) -> Count:
    """Boxes that overlap in part: count on the grid of all their edges."""
    shape = held.shape
    edges = [
        np.unique(np.concatenate([held.boxes.offsets[:, d], held.boxes.ends[:, d], [0, shape[d]]]))
        for d in range(len(shape))
    ]
    grid = tuple(len(edge) for edge in edges)
    if int(np.prod(grid, dtype=np.float64)) > _MOST_CELLS:
        raise LayoutError(f"{len(held)} regions that overlap in part cut the tensor into too many cells to count")
    # A box adds one at its corner and takes it away past its ends; running sums then give the count of every cell.
    sums = np.zeros(grid, dtype=np.int64)
    low = np.stack([np.searchsorted(edge, held.boxes.offsets[:, d]) for d, edge in enumerate(edges)])
    high = np.stack([np.searchsorted(edge, held.boxes.ends[:, d]) for d, edge in enumerate(edges)])
    for corner in np.ndindex(*(2,) * len(shape)):
        index = tuple(np.where(np.array(bit) == 1, high[d], low[d]) for d, bit in enumerate(corner))
        np.add.at(sums, index, (-1) ** sum(corner))
    for d in range(len(shape)):
        np.cumsum(sums, axis=d, out=sums)
    inner = sums[tuple(slice(0, -1) for _ in shape)]
    return Count(int(inner.min()), int(inner.max()))


def gaps(held: Holdings) -> tuple[Region, ...]:
    """The elements that no place holds, as disjoint boxes."""
    return missing(Region.whole(held.shape), distinct(held.boxes)[0])


def check(layout: Layout, names: Iterable[str] | None = None) -> None:
    """That every element of every tensor is held, and as often as declared.

    Args:
        layout: what to check.
        names: only these tensors.

    Raises:
        LayoutError: naming the tensor, and the elements that are missing or held too often.
    """
    counts: dict[int, Count] = {}
    for name in layout.tensors if names is None else names:
        held = layout.tensors[name]
        if id(held) not in counts:
            counts[id(held)] = count(held)
        found = counts[id(held)]
        if found.least == 0:
            nowhere = gaps(held)
            raise LayoutError(
                f"tensor {name!r} {list(held.shape)}: no place holds {', '.join(map(str, nowhere[:3]))}"
                + (f" and {len(nowhere) - 3} more regions" if len(nowhere) > 3 else "")
            )
        if held.copies is not None and (found.least, found.most) != (held.copies, held.copies):
            raise LayoutError(
                f"tensor {name!r} {list(held.shape)}: declared to be held {held.copies} times, but elements are held "
                f"{found.least} to {found.most} times: fragments are missing or doubled"
            )
