"""How one axis of the mesh cuts a tensor: the words of the specification language.

A tensor begins whole on every rank, and each cut leaves a rank with a part of what it had. Axes that no cut names hold
copies. So `(Shard("tp", 0), Flat("dp"))` is a column-parallel weight whose local part is cut flat over `dp`, and `()`
is replicated everywhere. A cut's result depends on what the cuts before it left: order matters, as it does in memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from resilin.layout.boxes import Ints
from resilin.layout.errors import LayoutError

Rule = Literal["ceil", "even"]


def intervals(length: Ints, ways: int, rule: Rule = "ceil", unit: int = 1, align: int = 1) -> tuple[Ints, Ints]:
    """(..., ways) where each way's interval of `length` begins and ends.

    Args:
        length: (...), multiples of `unit`.
        ways: into how many.
        rule: "ceil" is `torch.chunk` and DTensor: all as long as the first, the last ones shorter or empty (10 into
            4: 3, 3, 3, 1); "even" lengths differ by one at most (3, 3, 2, 2).
        unit: `length` is made of such units, and none is cut.
        align: cut at multiples of so many units, but for the last end.
    """
    units = length[..., None] // unit
    blocks = -(-units // align)
    way = np.arange(ways + 1, dtype=np.int64)
    if rule == "ceil":
        edges = way * -(-blocks // ways)
    else:
        edges = way * (blocks // ways) + np.minimum(way, blocks % ways)
    edges = np.minimum(edges * align, units) * unit
    return edges[..., :-1], edges[..., 1:]


@dataclass(frozen=True)
class Part:
    """One of the tensors that a fused one is made of.

    Attributes:
        size: how many indices of the cut dimension are its own.
        unit: it is cut at multiples of this only, such as the size of a head.
        spare: what ranks get when there are fewer units than ranks: "empty", or "copy", where neighbours share one
            unit (key and value heads under wide tensor parallelism).
        rule: how units are dealt out.
        groups: units belong together in so many equal groups (query heads that share a key head). A rank has whole
            groups or, where there are more ranks than groups, some units of one; None: each unit stands alone.
    """

    size: int
    unit: int = 1
    spare: Literal["empty", "copy"] = "empty"
    rule: Rule = "ceil"
    groups: int | None = None

    def intervals(self, ways: int) -> tuple[Ints, Ints]:
        """(ways,) where each rank's own interval of the part begins and ends."""
        if self.size % (self.unit * (self.groups or 1)):
            groups = f" and {self.groups} groups" if self.groups else ""
            raise LayoutError(f"a part of {self.size} indices cannot be cut in units of {self.unit}{groups}")
        units = self.size // self.unit
        if self.groups is not None:
            group = self.size // self.groups
            if self.groups >= ways:
                return intervals(np.array(self.size), ways, self.rule, group)
            if ways % self.groups:
                raise LayoutError(f"{self.groups} groups cannot be shared evenly by {ways} ranks")
            low, high = intervals(np.array(group), ways // self.groups, self.rule, self.unit)
            first = np.arange(self.groups, dtype=np.int64)[:, None] * group
            return (first + low).reshape(-1), (first + high).reshape(-1)
        if self.spare == "copy" and units < ways:
            if ways % units:
                raise LayoutError(f"{units} units cannot be shared evenly by {ways} ranks")
            first = np.arange(ways, dtype=np.int64) * units // ways * self.unit
            return first, first + self.unit
        return intervals(np.array(self.size), ways, self.rule, self.unit)


@dataclass(frozen=True)
class Shard:
    """An axis cuts one dimension.

    Attributes:
        axis: of the mesh.
        dim: of the tensor.
        parts: the tensors it is fused from, in order, each cut on its own: a rank holds its piece of the first, then
            of the second, ... Empty: it is one.
        widths: the length for each coordinate of the axis, or, with parts, one such row for each part; None: `rule`.
        rule: how a length is cut that does not divide.
    """

    axis: str
    dim: int
    parts: tuple[Part, ...] = ()
    widths: tuple[int, ...] | tuple[tuple[int, ...], ...] | None = None
    rule: Rule = "ceil"


@dataclass(frozen=True)
class Deal:
    """An axis owns virtual shards by a table: losing one rank moves only its own.

    Attributes:
        axis: of the mesh.
        owners: for each virtual shard the coordinate that holds it.
        dim: the dimension that is cut into virtual shards; None: the row-major order of all elements.
        rule: how lengths are cut that do not divide.
        align: shards begin at multiples of so many indices (elements, where `dim` is None). Element-wise kernels work
            on vectors of up to 16 float32 and round the few elements that are left over in another way (torch's fused
            AdamW on a CPU does): with shards that begin at such multiples an update does not depend on the cuts, to
            the bit.
    """

    axis: str
    owners: tuple[int, ...]
    dim: int | None = None
    rule: Rule = "ceil"
    align: int = 1


@dataclass(frozen=True)
class Flat:
    """An axis cuts the row-major order of what is left, each parameter by itself: ZeRO-3.

    Every rank's slot has the length of the first, `ceil(n / ranks)`; the last slots end in padding.

    Attributes:
        axis: of the mesh.
        buffer: name of the buffer the slots lie in, one parameter's after the other's; "" is the tensor's own.
        offset: of this parameter's slot in the buffer, in elements.
        align: slots are as long as a multiple of this; see `Deal`.
    """

    axis: str
    buffer: str = ""
    offset: int = 0
    align: int = 1


@dataclass(frozen=True)
class Window:
    """An axis cuts a flat buffer of many parameters, of which this one is a window: ZeRO-1 and ZeRO-2.

    Made by `flat_group`, which knows the other parameters.

    Attributes:
        axis: of the mesh.
        buffer: its name.
        offsets: where the parameter begins, for each cell of the mesh without the axis; -1: it is not there.
        ranges: for each such cell, how many elements of the buffer a rank has.
    """

    axis: str
    buffer: str
    offsets: tuple[int, ...]
    ranges: tuple[int, ...]


@dataclass(frozen=True)
class Only:
    """Only these coordinates of an axis hold it at all: the pipeline stage of a layer, or both of a tied embedding.

    Attributes:
        axis: of the mesh.
        at: coordinates.
    """

    axis: str
    at: tuple[int, ...]


Cut = Shard | Deal | Flat | Window | Only
