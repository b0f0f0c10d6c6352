"""Where ZeRO has each element of a parameter: pure, for writing such folders.

Stages 1 and 2 lay the parameters of a group one after the other, pad the row to a multiple of twice the ranks, and cut
it evenly. Stage 3 cuts every parameter on its own into slots of ceil(n / ranks), and lays the slots of a sub-group one
after the other: as many parameters of a group as it takes to fill `sub_group_size` elements of a rank.

Source: Rajbhandari et al., "ZeRO: Memory optimizations toward training trillion parameter models", 2020; the order,
alignment and sub-groups are those of DeepSpeed 0.14 to 0.19.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

Shape = tuple[int, ...]
ALIGNMENT = 2  # elements: DeepSpeed lets each rank's part begin at a multiple of four bytes of 16-bit copies


@dataclass(frozen=True)
class Fragment:
    """Consecutive elements of a parameter on one rank.

    Attributes:
        rank: that has them.
        first, end: of the parameter, in row-major order.
        at: index in the rank's row of the first.
    """

    rank: int
    first: int
    end: int
    at: int


@dataclass(frozen=True)
class Rows:
    """The flat rows of all ranks for one group, or sub-group of stage 3.

    Attributes:
        group: parameter group it is of.
        shapes: name -> shape of its parameters, in order.
        size: elements of each rank's row, with padding.
        paddings: elements at the end of each rank's row that are of no parameter (stages 1 and 2).
        fragments: name -> its fragments, by rank; ranks without any element of it have none.
    """

    group: int
    shapes: Mapping[str, Shape]
    size: int
    paddings: tuple[int, ...]
    fragments: Mapping[str, tuple[Fragment, ...]]


def group_rows(group: int, shapes: Mapping[str, Shape], ranks: int) -> Rows:
    """The rows of a group in stages 1 and 2.

    Args:
        group: its number.
        shapes: name -> shape of its parameters, in order.
        ranks: that it is cut over.
    """
    total = sum(math.prod(shape) for shape in shapes.values())
    unit = ALIGNMENT * ranks
    size = math.ceil(total / unit) * unit // ranks
    fragments, begin = {}, 0
    for name, shape in shapes.items():
        end = begin + math.prod(shape)
        parts = []
        for rank in range(begin // size, -(-end // size)):
            first, last = max(begin, rank * size), min(end, (rank + 1) * size)
            parts.append(Fragment(rank, first - begin, last - begin, first - rank * size))
        fragments[name] = tuple(parts)
        begin = end
    paddings = tuple(min(size, max(0, (rank + 1) * size - total)) for rank in range(ranks))
    return Rows(group, dict(shapes), size, paddings, fragments)


def sub_group_rows(group: int, shapes: Mapping[str, Shape], ranks: int, sub_group_size: int) -> list[Rows]:
    """The rows of a group's sub-groups in stage 3.

    Args:
        group: its number.
        shapes: name -> shape of its parameters, in order.
        ranks: that each parameter is cut over.
        sub_group_size: elements of a rank at which a sub-group is full (DeepSpeed's setting of that name).
    """
    found, inside, filled = [], {}, 0
    last = len(shapes) - 1
    for number, (name, shape) in enumerate(shapes.items()):
        inside[name] = shape
        filled += slot(math.prod(shape), ranks)
        if filled >= sub_group_size or number == last:
            found.append(_slots(group, inside, ranks))
            inside, filled = {}, 0
    return found


def slot(count: int, ranks: int) -> int:
    """Elements of a parameter on each rank of stage 3, with padding."""
    return -(-count // ranks)


def slots(count: int, ranks: int, at: int = 0) -> tuple[Fragment, ...]:
    """The fragments of a parameter of so many elements in stage 3, at an index of each rank's row."""
    each = slot(count, ranks)
    cuts = ((rank, rank * each, min((rank + 1) * each, count)) for rank in range(ranks))
    return tuple(Fragment(rank, first, end, at) for rank, first, end in cuts if first < end)


def _slots(group: int, shapes: Mapping[str, Shape], ranks: int) -> Rows:
    fragments, at = {}, 0
    for name, shape in shapes.items():
        fragments[name] = slots(math.prod(shape), ranks, at)
        at += slot(math.prod(shape), ranks)
    return Rows(group, dict(shapes), at, (0,) * ranks, fragments)
