"""Many regions of one tensor at once, in columns: what `Region` says one by one, here for a thousand ranks in numpy.

Shapes: N boxes, D dimensions of the tensor. Every function agrees with the algebra of `region.py`; the tests compare.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from resilin.layout.errors import LayoutError
from resilin.layout.region import Region, row_major

Ints = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Boxes:
    """N boxes of a tensor with D dimensions.

    Attributes:
        offsets: (N, D), the first index of each.
        sizes: (N, D), how many indices.
    """

    offsets: Ints
    sizes: Ints

    @classmethod
    def of(cls, regions: Iterable[Region], dims: int) -> Boxes:
        """From regions, each with `dims` dimensions."""
        listed = list(regions)
        if any(len(region.sizes) != dims for region in listed):
            raise LayoutError(f"not all of these regions have {dims} dimensions: {', '.join(map(str, listed[:5]))}")
        shape = len(listed), dims
        return cls(
            np.array([region.offsets for region in listed], dtype=np.int64).reshape(shape),
            np.array([region.sizes for region in listed], dtype=np.int64).reshape(shape),
        )

    def __len__(self) -> int:
        return len(self.offsets)

    def __iter__(self) -> Iterator[Region]:
        for offset, size in zip(self.offsets.tolist(), self.sizes.tolist(), strict=True):
            yield Region(tuple(offset), tuple(size))

    def region(self, row: int) -> Region:
        """One of them."""
        return Region(tuple(self.offsets[row].tolist()), tuple(self.sizes[row].tolist()))

    @property
    def dims(self) -> int:
        """D."""
        return int(self.offsets.shape[1])

    @property
    def ends(self) -> Ints:
        """(N, D), one past the last index."""
        return self.offsets + self.sizes

    @property
    def numel(self) -> Ints:
        """(N,), elements of each."""
        product: Ints = self.sizes.prod(axis=1, dtype=np.int64)
        return product

    def take(self, rows: NDArray[np.intp] | NDArray[np.bool_] | Ints) -> Boxes:
        """Some of them, by number or mask."""
        return Boxes(self.offsets[rows], self.sizes[rows])


def concatenate(parts: Sequence[Boxes]) -> Boxes:
    """All of them, one after the other."""
    return Boxes(np.concatenate([p.offsets for p in parts]), np.concatenate([p.sizes for p in parts]))


def distinct(boxes: Boxes) -> tuple[Boxes, Ints]:
    """Each box once, ordered by position, and (N,) which of them each of the given ones is."""
    keys = np.concatenate([boxes.offsets, boxes.sizes], axis=1)
    order = np.lexsort(keys.T[::-1]) if keys.shape[1] else np.arange(len(keys))
    ordered = keys[order]
    new = np.ones(len(keys), dtype=bool)
    new[1:] = (ordered[1:] != ordered[:-1]).any(axis=1)
    number = np.empty(len(keys), dtype=np.int64)
    number[order] = np.cumsum(new) - 1
    return boxes.take(order[new]), number


def overlaps(first: Boxes, second: Boxes) -> tuple[Ints, Ints, Boxes]:
    """Every pair that shares elements.

    Along one dimension the boxes of `first` are sorted, and each of `second` looks up the interval that it can touch;
    the dimension that leaves the fewest candidates is taken. So the cost is close to what comes out, not N times M.

    Returns:
        (K,) row in `first`, (K,) row in `second`, and the K shared boxes, ordered by the row in `second`.
    """
    if first.dims == 0:
        n, m = len(first), len(second)
        empty = np.zeros((n * m, 0), dtype=np.int64)
        return np.tile(np.arange(n, dtype=np.int64), m), np.repeat(np.arange(m, dtype=np.int64), n), Boxes(empty, empty)
    if not len(first) or not len(second):
        none = np.zeros(0, dtype=np.int64)
        return none, none, Boxes(np.zeros((0, first.dims), np.int64), np.zeros((0, first.dims), np.int64))
    searches = [_candidates(first, second, dim) for dim in range(first.dims)]
    order, begin, counts = min(searches, key=lambda search: int(search[2].sum()))
    b = np.repeat(np.arange(len(second), dtype=np.int64), counts)
    nth = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    a = order[nth + np.repeat(begin, counts)]
    low = np.maximum(first.offsets[a], second.offsets[b])
    sizes = np.minimum(first.offsets[a] + first.sizes[a], second.offsets[b] + second.sizes[b]) - low
    real = (sizes > 0).all(axis=1)
    return a[real], b[real], Boxes(low[real], sizes[real])


def _candidates(first: Boxes, second: Boxes, dim: int) -> tuple[Ints, Ints, Ints]:
    """The order of `first` along a dimension; for each of `second` where its candidates begin there, and how many."""
    order = np.argsort(first.offsets[:, dim], kind="stable").astype(np.int64)
    starts = first.offsets[order, dim]
    reach = np.maximum.accumulate(starts + first.sizes[order, dim])
    begin = np.searchsorted(reach, second.offsets[:, dim], side="right")
    end = np.searchsorted(starts, second.offsets[:, dim] + second.sizes[:, dim], side="left")
    return order, begin.astype(np.int64), np.maximum(end - begin, 0).astype(np.int64)


def flat_ranges(shape: Sequence[int], starts: Ints, ends: Ints) -> tuple[Ints, Boxes]:
    """Many row-major ranges of one tensor as boxes: `flat_range` for N ranges.

    Returns:
        (K,) which range each box belongs to, and the K boxes (ascending within a range).
    """
    which = np.arange(len(starts), dtype=np.int64)
    rows, boxes = _flat(tuple(shape), which, starts.astype(np.int64), ends.astype(np.int64))
    order = np.lexsort((boxes.offsets @ np.array(row_major(shape), dtype=np.int64), rows))
    return rows[order], boxes.take(order)


def _flat(shape: tuple[int, ...], which: Ints, starts: Ints, ends: Ints) -> tuple[Ints, Boxes]:
    keep = starts < ends
    which, starts, ends = which[keep], starts[keep], ends[keep]
    if not shape:
        empty = np.zeros((len(which), 0), dtype=np.int64)
        return which, Boxes(empty, empty)
    rest = int(np.prod(shape[1:], dtype=np.int64))
    first, last = -(-starts // rest), ends // rest
    found: list[tuple[Ints, Boxes]] = []

    def under(rows: Ints, mask: NDArray[np.bool_], low: Ints, high: Ints) -> None:
        """The part of single rows, one dimension further in."""
        if mask.any():
            numbers = np.flatnonzero(mask)
            inner, boxes = _flat(shape[1:], numbers, low[mask], high[mask])
            lead = np.stack([rows[inner], np.ones(len(inner), dtype=np.int64)], axis=1)
            found.append(
                (
                    which[inner],
                    Boxes(
                        np.concatenate([lead[:, :1], boxes.offsets], axis=1),
                        np.concatenate([lead[:, 1:], boxes.sizes], axis=1),
                    ),
                )
            )

    within = first > last
    under(last, within, starts - last * rest, ends - last * rest)
    under(first - 1, ~within & (starts < first * rest), starts - (first - 1) * rest, np.full_like(starts, rest))
    whole = first < last
    if whole.any():
        offsets = np.zeros((int(whole.sum()), len(shape)), dtype=np.int64)
        sizes = np.tile(np.array(shape, dtype=np.int64), (len(offsets), 1))
        offsets[:, 0], sizes[:, 0] = first[whole], (last - first)[whole]
        found.append((which[whole], Boxes(offsets, sizes)))
    under(last, ~within & (last * rest < ends), np.zeros_like(starts), ends - last * rest)
    if not found:
        none = np.zeros((0, len(shape)), dtype=np.int64)
        return np.zeros(0, dtype=np.int64), Boxes(none, none)
    return np.concatenate([w for w, _ in found]), concatenate([b for _, b in found])


def slabs(boxes: Boxes, counts: Ints) -> tuple[Ints, Boxes]:
    """Each box cut into about so many equal pieces along its first dimension that has as many indices (or its longest).

    Returns:
        (K,) the box each piece is of, and the pieces.
    """
    if boxes.dims == 0:
        return np.arange(len(boxes), dtype=np.int64), boxes
    enough = boxes.sizes >= counts[:, None]
    dim = np.where(enough.any(axis=1), enough.argmax(axis=1), boxes.sizes.argmax(axis=1))
    rows = np.arange(len(boxes))
    length = boxes.sizes[rows, dim]
    pieces = np.clip(counts, 1, length)
    which = np.repeat(rows, pieces).astype(np.int64)
    number = np.arange(len(which)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    low = number * length[which] // pieces[which]
    high = (number + 1) * length[which] // pieces[which]
    offsets, sizes = boxes.offsets[which].copy(), boxes.sizes[which].copy()
    into = np.arange(len(which)), dim[which]
    offsets[into] += low
    sizes[into] = high - low
    return which, Boxes(offsets, sizes)
