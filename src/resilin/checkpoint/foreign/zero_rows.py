"""Where ZeRO has each element of a parameter, as a layout: pure, for writing such folders.

Stages 1 and 2 lay the parameters of a group one after the other, pad the row to a multiple of twice the ranks, and cut
it evenly (`flat_group`). Stage 3 cuts every parameter on its own into slots of ceil(n / ranks) (`Flat`), and lays the
slots of a sub-group one after the other: as many parameters of a group as it takes to fill `sub_group_size` elements
of a rank.

Source: Rajbhandari et al., "ZeRO: Memory optimizations toward training trillion parameter models", 2020; the order,
alignment and sub-groups are those of DeepSpeed 0.14 to 0.19.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from resilin.layout import Flat, Layout, Mesh, ParamSpec, Window, flat_group, layout_of

Shape = tuple[int, ...]
_ROW = "row"


@dataclass(frozen=True)
class Rows:
    """The flat rows of all ranks for one group, or sub-group of stage 3.

    Attributes:
        group: parameter group it is of.
        shapes: name -> shape of its parameters, in order.
        size: elements of each rank's row, with padding.
        paddings: elements at the end of each rank's row that are of no parameter (stages 1 and 2).
        layout: of the parameters in the rows.
    """

    group: int
    shapes: Mapping[str, Shape]
    size: int
    paddings: tuple[int, ...]
    layout: Layout

    def address(self, name: str, rank: int) -> tuple[int, int] | None:
        """Where a rank's part of a parameter begins in its row, and how many elements it has; None: it has none."""
        held = self.layout.tensors[name]
        mine = np.flatnonzero(held.places == rank)
        return (int(held.starts[mine].min()), int(held.boxes.numel[mine].sum())) if len(mine) else None

    def scatter(self, name: str, value: Tensor, rows: Sequence[Tensor]) -> None:
        """Copy a whole parameter, or a state of it, to where the ranks' rows have it."""
        held = self.layout.tensors[name]
        for number in range(len(held)):
            region, strides = held.boxes.region(number), held.strides[number].tolist()
            row = rows[int(held.places[number])]
            row.as_strided(region.sizes, strides, row.storage_offset() + int(held.starts[number])).copy_(
                value[region.slices]
            )


def group_rows(group: int, shapes: Mapping[str, Shape], ranks: int) -> Rows:
    """The rows of a group in stages 1 and 2.

    Args:
        group: its number.
        shapes: name -> shape of its parameters, in order; each has elements.
        ranks: that it is cut over.
    """
    mesh = Mesh.of(dp=ranks)
    specs = flat_group({name: ParamSpec(shape) for name, shape in shapes.items()}, mesh, "dp", _ROW)
    window = next(iter(specs.values())).cuts[-1]
    assert isinstance(window, Window)
    size, total = window.ranges[0], sum(map(math.prod, shapes.values()))
    paddings = tuple(min(size, max(0, (rank + 1) * size - total)) for rank in range(ranks))
    return Rows(group, dict(shapes), size, paddings, layout_of(specs, mesh, buffers=[_ROW]))


def sub_group_rows(group: int, shapes: Mapping[str, Shape], ranks: int, sub_group_size: int) -> list[Rows]:
    """The rows of a group's sub-groups in stage 3.

    Args:
        group: its number.
        shapes: name -> shape of its parameters, in order; each has elements.
        ranks: that each parameter is cut over.
        sub_group_size: elements of a rank at which a sub-group is full (DeepSpeed's setting of that name).
    """
    found: list[Rows] = []
    inside: dict[str, Shape] = {}
    filled = 0
    for name, shape in shapes.items():
        if filled >= sub_group_size:
            found.append(slot_rows(group, inside, ranks))
            inside, filled = {}, 0
        inside[name] = shape
        filled += slot(math.prod(shape), ranks)
    return [*found, slot_rows(group, inside, ranks)]


def slot(count: int, ranks: int) -> int:
    """Elements of a parameter on each rank of stage 3, with padding."""
    return -(-count // ranks)


def slot_rows(group: int, shapes: Mapping[str, Shape], ranks: int) -> Rows:
    """The rows of one sub-group in stage 3, the slots of its parameters one after the other."""
    mesh, specs, at = Mesh.of(dp=ranks), {}, 0
    for name, shape in shapes.items():
        specs[name] = ParamSpec(shape, cuts=(Flat("dp", _ROW, at),))
        at += slot(math.prod(shape), ranks)
    return Rows(group, dict(shapes), at, (0,) * ranks, layout_of(specs, mesh, buffers=[_ROW]))
