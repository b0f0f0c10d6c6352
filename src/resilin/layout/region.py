"""A box inside a tensor, and the little algebra on it: everything elastic in Resilin is computed with these."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from resilin.layout.errors import LayoutError


@dataclass(frozen=True, order=True)
class Region:
    """The elements `[offset, offset + size)` of every dimension of one tensor.

    The tensor itself is named where regions are kept (`Layout`). A scalar has the region without dimensions; a size
    of zero makes a region empty, but leaves it its position.

    Attributes:
        offsets: the first index in each dimension.
        sizes: how many indices in each dimension.
    """

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.offsets) != len(self.sizes):
            raise LayoutError(f"a region needs an offset and a size for each dimension, got {self}")
        if any(number < 0 for number in (*self.offsets, *self.sizes)):
            raise LayoutError(f"offsets and sizes of a region cannot be negative, got {self}")

    @classmethod
    def whole(cls, shape: Sequence[int]) -> Region:
        """Everything of a tensor of this shape."""
        return cls((0,) * len(shape), tuple(shape))

    @classmethod
    def of_slices(cls, slices: Iterable[slice]) -> Region:
        """The region of `tensor[slices]`, whose slices have a start and a stop and step by one.

        Raises:
            LayoutError: for an open slice, or one with another step.
        """
        pairs = []
        for one in slices:
            if one.start is None or one.stop is None or one.step not in (None, 1):
                raise LayoutError(f"{one} has no start, no stop, or steps by more than one: it is no region")
            pairs.append((one.start, max(one.stop - one.start, 0)))
        return cls(tuple(start for start, _ in pairs), tuple(size for _, size in pairs))

    def __str__(self) -> str:
        return "[" + ", ".join(f"{o}:{o + s}" for o, s in zip(self.offsets, self.sizes, strict=True)) + "]"

    @property
    def numel(self) -> int:
        """How many elements it has."""
        return math.prod(self.sizes)

    @property
    def ends(self) -> tuple[int, ...]:
        """One past the last index in each dimension."""
        return tuple(o + s for o, s in zip(self.offsets, self.sizes, strict=True))

    @property
    def slices(self) -> tuple[slice, ...]:
        """What to index a tensor (or array) with to see the region."""
        return tuple(slice(o, o + s) for o, s in zip(self.offsets, self.sizes, strict=True))

    def __and__(self, other: Region) -> Region:
        """What both share; empty where they share nothing."""
        if len(self.offsets) != len(other.offsets):
            raise LayoutError(f"{self} and {other} have different numbers of dimensions")
        starts = tuple(map(max, self.offsets, other.offsets))
        ends = map(min, self.ends, other.ends)
        return Region(starts, tuple(max(end - start, 0) for start, end in zip(starts, ends, strict=True)))

    def __contains__(self, other: Region) -> bool:
        """Whether all of `other` lies inside; an empty region lies in everything."""
        return other.numel == 0 or (self & other) == other

    def __sub__(self, other: Region) -> tuple[Region, ...]:
        """What is left without `other`: disjoint boxes, at most two for each dimension, in order of position.

        Dimension by dimension, what lies before and after the hole is cut off at full width, so that the first
        dimensions' boxes are the large and (in row-major memory) the contiguous ones.
        """
        hole = self & other
        if hole.numel == 0:
            return (self,) if self.numel else ()
        before: list[Region] = []
        after: list[Region] = []
        offsets, sizes = list(self.offsets), list(self.sizes)
        for dim, (start, end) in enumerate(zip(hole.offsets, hole.ends, strict=True)):
            for kept, first, last in ((before, offsets[dim], start), (after, end, offsets[dim] + sizes[dim])):
                if first < last:
                    kept.append(
                        Region(
                            (*offsets[:dim], first, *offsets[dim + 1 :]),
                            (*sizes[:dim], last - first, *sizes[dim + 1 :]),
                        )
                    )
            offsets[dim], sizes[dim] = start, end - start
        return (*before, *reversed(after))

    def shifted(self, by: Sequence[int]) -> Region:
        """The region moved by so many indices in each dimension."""
        return Region(tuple(o + b for o, b in zip(self.offsets, by, strict=True)), self.sizes)

    def inside(self, outer: Region) -> Region:
        """The same elements, counted from the first of `outer`: where they lie in a tensor that holds just `outer`.

        Raises:
            LayoutError: when it is not inside.
        """
        if self not in outer:
            raise LayoutError(f"{self} is not inside {outer}")
        return self.shifted([-offset for offset in outer.offsets])

    def flat(self, shape: Sequence[int]) -> Iterator[tuple[int, int]]:
        """Its runs `(first, count)` in the row-major order of a tensor of `shape`, ascending and as long as can be."""
        if self.numel == 0:
            return
        strides = row_major(shape)
        tail = len(shape)  # dimensions from here on are taken whole
        while tail and self.sizes[tail - 1] == shape[tail - 1]:
            tail -= 1
        run = math.prod(self.sizes[max(tail - 1, 0) :])
        for index in itertools.product(*(range(size) for size in self.sizes[: max(tail - 1, 0)])):
            full = (*index, *(0,) * (len(shape) - len(index)))
            yield sum((i + o) * s for i, o, s in zip(full, self.offsets, strides, strict=True)), run


def row_major(shape: Sequence[int]) -> tuple[int, ...]:
    """Elements from one index to the next in each dimension of a contiguous tensor."""
    return tuple(math.prod(shape[dim + 1 :]) for dim in range(len(shape)))


def flat_range(shape: Sequence[int], start: int, end: int) -> tuple[Region, ...]:
    """The elements `[start, end)` of the row-major order of a tensor as disjoint boxes in that order.

    A range of rows is one box; one that begins or ends inside a row needs one more for each such dimension: at most
    `2 * len(shape) - 1` in all.

    Raises:
        LayoutError: when the tensor has no such elements.
    """
    total = math.prod(shape)
    if not 0 <= start <= end <= total:
        raise LayoutError(f"a tensor of shape {list(shape)} has {total} elements, not a range {start}:{end}")
    if start == end:
        return ()
    if not shape:
        return (Region((), ()),)
    inner, rest = shape[1:], math.prod(shape[1:])
    first, last = -(-start // rest), end // rest  # whole rows
    if first > last:  # inside one row
        return _under(last, flat_range(inner, start - last * rest, end - last * rest))
    boxes: list[Region] = []
    if start < first * rest:
        boxes += _under(first - 1, flat_range(inner, start - (first - 1) * rest, rest))
    if first < last:
        boxes.append(Region((first, *(0,) * len(inner)), (last - first, *inner)))
    if last * rest < end:
        boxes += _under(last, flat_range(inner, 0, end - last * rest))
    return tuple(boxes)


def _under(row: int, boxes: Iterable[Region]) -> tuple[Region, ...]:
    return tuple(Region((row, *box.offsets), (1, *box.sizes)) for box in boxes)


def missing(whole: Region, parts: Iterable[Region]) -> tuple[Region, ...]:
    """What of `whole` no part covers, as disjoint boxes."""
    left: tuple[Region, ...] = (whole,) if whole.numel else ()
    for part in parts:
        left = tuple(box for old in left for box in old - part)
        if not left:
            break
    return left


def tiles(whole: Region, parts: Sequence[Region]) -> bool:
    """Whether the parts cover `whole` without gap and overlap, and nothing outside it."""
    return (
        sum(part.numel for part in parts) == whole.numel
        and all(part in whole for part in parts)
        and not missing(whole, parts)
    )
