"""What each rank has of one tensor while it is cut, axis by axis.

Shapes: V virtual ranks (coordinates on the axes that have cut so far), N pieces over all of them, D dimensions,
W ways that a cut has, S segments of a way. A virtual rank's own tensor is made of pieces of the whole one that lie side
by side in it; a cut takes intervals ("segments") of the own tensor, which it joins again without gaps.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from resilin.layout.boxes import Boxes, Ints, concatenate, flat_ranges, overlaps
from resilin.layout.cuts import Cut, Deal, Flat, Only, Shard, Window, intervals
from resilin.layout.errors import LayoutError
from resilin.layout.holdings import Holdings
from resilin.layout.mesh import Mesh
from resilin.layout.region import row_major


@dataclass(frozen=True, eq=False)
class Segments:
    """For each virtual rank and way, the intervals it takes of the own tensor and where they begin in its new one.

    Attributes:
        low: (V, W, S) first position.
        high: (V, W, S) one past the last; a segment may be empty.
        base: (V, W, S) position in the new tensor.
    """

    low: Ints
    high: Ints
    base: Ints

    @classmethod
    def joined(cls, low: Ints, high: Ints) -> Segments:
        """Segments that lie one after the other in the new tensor."""
        lengths = high - low
        return cls(low, high, np.cumsum(lengths, axis=-1) - lengths)


@dataclass(frozen=True, eq=False)
class Local:
    """One tensor as all virtual ranks have it.

    Attributes:
        shape: of the whole tensor, without padding.
        axes: (name, coordinates that exist) of the axes that have cut; V is the product of their counts.
        shapes: (V, D) of each virtual rank's own tensor, padding included.
        rank: (N,) the virtual rank of each piece.
        whole: the pieces as regions of the whole tensor.
        own: (N, D) where each begins in the own tensor; once it is flat, unused.
        ways: over how many virtual ranks one copy is spread.
        starts: (N,) once flat: its address in the buffer.
        strides: (N, D) once flat: from one index to the next.
        lengths: (V,) once flat: elements of the own slot.
        buffer: once flat: the buffer's name; "" is the tensor's own.
        shared: some elements are held by more ranks of an axis than others, so no number of copies can be declared.
    """

    shape: tuple[int, ...]
    axes: tuple[tuple[str, tuple[int, ...]], ...]
    shapes: Ints
    rank: Ints
    whole: Boxes
    own: Ints
    ways: int = 1
    starts: Ints | None = None
    strides: Ints | None = None
    lengths: Ints | None = None
    buffer: str = ""
    shared: bool = False

    @classmethod
    def uncut(cls, shape: tuple[int, ...], padded: tuple[int, ...]) -> Local:
        """One virtual rank with everything."""
        zeros = np.zeros((1, len(shape)), dtype=np.int64)
        pieces = Boxes(zeros, np.array([shape], dtype=np.int64).reshape(1, len(shape)))
        sizes = np.array([padded], dtype=np.int64).reshape(1, len(shape))
        real: NDArray[np.bool_] = np.all(pieces.sizes > 0, axis=1)
        return cls(shape, (), sizes, np.zeros(int(real.sum()), dtype=np.int64), pieces.take(real), zeros[real])

    def cut(self, cut: Cut, mesh: Mesh) -> Local:
        """After one more cut.

        Raises:
            LayoutError: when the cut does not fit.
        """
        if self.starts is not None:
            raise LayoutError(f"{cut} comes after a flat cut, which must be the last")
        if any(name == cut.axis for name, _ in self.axes):
            raise LayoutError(f"axis {cut.axis!r} cuts twice")
        match cut:
            case Only():
                return self._only(cut, mesh)
            case Shard():
                return self._shard(cut, mesh.axis(cut.axis))
            case Deal():
                return self._deal(cut, mesh.axis(cut.axis))
            case Flat():
                return self._flat(cut, mesh.axis(cut.axis))
            case Window():
                return self._window(cut, mesh)

    def _dim(self, dim: int) -> int:
        if not -len(self.shape) <= dim < len(self.shape):
            raise LayoutError(f"a tensor of shape {list(self.shape)} has no dimension {dim}")
        return dim % len(self.shape)

    def _only(self, cut: Only, mesh: Mesh) -> Local:
        ways = mesh.axis(cut.axis)
        if not cut.at or len(set(cut.at)) != len(cut.at) or not all(0 <= at < ways for at in cut.at):
            raise LayoutError(f"{cut} names coordinates that axis {cut.axis!r} of size {ways} does not have, or twice")
        return self._repeated(cut.axis, cut.at)

    def _repeated(self, axis: str, at: tuple[int, ...]) -> Local:
        """A copy for each coordinate."""
        ways = len(at)
        return replace(
            self,
            axes=(*self.axes, (axis, at)),
            shapes=np.repeat(self.shapes, ways, axis=0),
            rank=(self.rank[:, None] * ways + np.arange(ways)).reshape(-1),
            whole=Boxes(np.repeat(self.whole.offsets, ways, axis=0), np.repeat(self.whole.sizes, ways, axis=0)),
            own=np.repeat(self.own, ways, axis=0),
        )

    def _shard(self, cut: Shard, ways: int) -> Local:
        dim = self._dim(cut.dim)
        length = self.shapes[:, dim]
        if not cut.parts:
            if cut.widths is None:
                low, high = intervals(length, ways, cut.rule)
            else:
                low, high = _given(cut.widths, ways, int(length[0]), (length == length[0]).all())
                low, high = (np.broadcast_to(edge, (len(length), ways)) for edge in (low, high))
            return self._take(cut.axis, dim, Segments.joined(low[..., None], high[..., None]))
        if (length != sum(part.size for part in cut.parts)).any():
            raise LayoutError(
                f"the parts have {sum(part.size for part in cut.parts)} indices together, but dimension {dim} of what "
                f"is cut has {int(length[0])}"
            )
        lows, highs, base = [], [], 0
        for number, part in enumerate(cut.parts):
            if cut.widths is None:
                low, high = part.intervals(ways)
            else:
                row = cut.widths[number] if number < len(cut.widths) else ()
                low, high = _given(row if isinstance(row, tuple) else (), ways, part.size, True)
            lows.append(low + base)
            highs.append(high + base)
            base += part.size
        low, high = np.stack(lows, axis=-1), np.stack(highs, axis=-1)
        wide = (len(length), ways, len(cut.parts))
        made = self._take(cut.axis, dim, Segments.joined(np.broadcast_to(low, wide), np.broadcast_to(high, wide)))
        copied = any(part.spare == "copy" and part.size // part.unit < ways for part in cut.parts)
        return replace(made, shared=self.shared or copied)

    def _deal(self, cut: Deal, ways: int) -> Local:
        if not cut.owners or not all(0 <= owner < ways for owner in cut.owners):
            raise LayoutError(f"a table of owners has coordinates of axis {cut.axis!r}, 0 to {ways - 1}: {cut.owners}")
        length = self.shapes.prod(axis=1) if cut.dim is None else self.shapes[:, self._dim(cut.dim)]
        low, high = intervals(length, len(cut.owners), cut.rule, align=cut.align)
        owners = np.array(cut.owners)
        most = int(np.bincount(owners, minlength=ways).max())
        mine = np.full((ways, most), -1)
        for way in range(ways):
            shards = np.flatnonzero(owners == way)
            mine[way, : len(shards)] = shards
        low, high = low[:, mine], np.where(mine >= 0, high[:, mine], low[:, mine])
        segments = Segments.joined(low, high)
        if cut.dim is not None:
            return self._take(cut.axis, self._dim(cut.dim), segments)
        return self._flatten(cut.axis, segments, (high - low).sum(axis=-1), "")

    def _take(self, axis: str, dim: int, segments: Segments) -> Local:
        """Each way's segments of one dimension."""
        ways = segments.low.shape[1]
        shapes = np.repeat(self.shapes, ways, axis=0)
        shapes[:, dim] = (segments.high - segments.low).sum(axis=-1).reshape(-1)
        begin, size = self.own[:, dim, None, None], self.whole.sizes[:, dim, None, None]
        low = np.maximum(segments.low[self.rank], begin)  # (N, W, S)
        high = np.minimum(segments.high[self.rank], begin + size)
        piece, way, number = np.nonzero(low < high)
        at = piece, way, number
        offsets, sizes, own = (a[piece].copy() for a in (self.whole.offsets, self.whole.sizes, self.own))
        offsets[:, dim] += low[at] - self.own[piece, dim]
        sizes[:, dim] = high[at] - low[at]
        rank = self.rank[piece]
        own[:, dim] = low[at] - segments.low[rank, way, number] + segments.base[rank, way, number]
        return replace(
            self,
            axes=(*self.axes, (axis, tuple(range(ways)))),
            shapes=shapes,
            rank=rank * ways + way,
            whole=Boxes(offsets, sizes),
            own=own,
            ways=self.ways * ways,
        )

    def _flat(self, cut: Flat, ways: int) -> Local:
        total = self.shapes.prod(axis=1)
        low, high = intervals(total, ways, align=cut.align)
        slot = -(-total // (ways * cut.align)) * cut.align
        made = self._flatten(
            cut.axis,
            Segments.joined(low[..., None], high[..., None]),
            np.repeat(slot[:, None], ways, axis=1),
            cut.buffer,
        )
        return replace(made, starts=None if made.starts is None else made.starts + cut.offset)

    def _window(self, cut: Window, mesh: Mesh) -> Local:
        local = self
        cut_already = {name for name, _ in self.axes}
        for name, size in mesh.axes:
            if name != cut.axis and name not in cut_already:
                local = local._repeated(name, tuple(range(size)))
        ways = mesh.axis(cut.axis)
        cells = local._cells(mesh, cut.axis)
        offset = np.array(cut.offsets, dtype=np.int64)[cells]
        share = np.array(cut.ranges, dtype=np.int64)[cells]
        if (offset < 0).any():
            raise LayoutError(f"the window into buffer {cut.buffer!r} is missing where the parameter is held")
        total = local.shapes.prod(axis=1)
        way = np.arange(ways, dtype=np.int64)
        low = np.clip(way * share[:, None] - offset[:, None], 0, total[:, None])
        high = np.clip((way + 1) * share[:, None] - offset[:, None], 0, total[:, None])
        base = np.maximum(offset[:, None] - way * share[:, None], 0)
        segments = Segments(low[..., None], high[..., None], base[..., None])
        return local._flatten(cut.axis, segments, np.repeat(share[:, None], ways, axis=1), cut.buffer)

    def _cells(self, mesh: Mesh, without: str) -> Ints:
        """(V,) the number of each virtual rank on the mesh without an axis."""
        coordinates = self._coordinates()
        number = np.zeros(len(self.shapes), dtype=np.int64)
        for name, size in mesh.axes:
            if name != without:
                number = number * size + coordinates[name]
        return number

    def _coordinates(self) -> dict[str, Ints]:
        grid = np.indices([len(at) for _, at in self.axes]).reshape(len(self.axes), len(self.shapes))
        return {name: np.array(at, dtype=np.int64)[grid[row]] for row, (name, at) in enumerate(self.axes)}

    def _flatten(self, axis: str, segments: Segments, lengths: Ints, buffer: str) -> Local:
        """Each way's segments of the row-major order of the own tensor."""
        ways = segments.low.shape[1]
        shapes, alike = np.unique(self.shapes, axis=0, return_inverse=True)
        parts: list[tuple[Ints, Boxes, Ints, Ints]] = []
        for number, sizes in enumerate(shapes):
            virtual = np.flatnonzero(alike.reshape(-1) == number)
            steps = np.array(row_major(tuple(sizes.tolist())), dtype=np.int64)
            low, high, base = (a[virtual].reshape(-1) for a in (segments.low, segments.high, segments.base))
            who, way = (a.reshape(-1) for a in np.indices((len(virtual), ways, segments.low.shape[2]))[:2])
            segment, ranges = flat_ranges(tuple(sizes.tolist()), low, high)
            mine = np.flatnonzero(np.isin(self.rank, virtual))
            # The virtual rank is one more dimension, so that one search finds what every one of them has.
            piece, of, shared = overlaps(
                _in_front(self.rank[mine], Boxes(self.own[mine], self.whole.sizes[mine])),
                _in_front(virtual[who[segment]], ranges),
            )
            shared = Boxes(shared.offsets[:, 1:], shared.sizes[:, 1:])
            segment, piece = segment[of], mine[piece]
            moved = shared.offsets - self.own[piece] + self.whole.offsets[piece]
            at = shared.offsets @ steps - low[segment] + base[segment]
            rank = self.rank[piece] * ways + way[segment]
            parts.append((rank, Boxes(moved, shared.sizes), at, np.broadcast_to(steps, moved.shape)))
        ranks, boxes, starts, strides = zip(*parts, strict=True)
        return replace(
            self,
            axes=(*self.axes, (axis, tuple(range(ways)))),
            shapes=np.repeat(self.shapes, ways, axis=0),
            rank=np.concatenate(ranks),
            whole=concatenate(boxes),
            own=np.zeros((0, len(self.shape)), dtype=np.int64),
            ways=self.ways * ways,
            starts=np.concatenate(starts),
            strides=np.concatenate(strides),
            lengths=lengths.reshape(-1),
            buffer=buffer,
        )

    def _virtual(self, mesh: Mesh) -> Ints:
        """(ranks,) the virtual rank that each rank of the mesh is; -1: it holds nothing."""
        coordinates = mesh.coordinates()
        number = np.zeros(mesh.size, dtype=np.int64)
        missing = np.zeros(mesh.size, dtype=bool)
        for name, at in self.axes:
            where = coordinates.get(name, np.zeros(mesh.size, dtype=np.int64))
            table = np.full(mesh.axis(name), -1, dtype=np.int64)
            table[list(at)] = np.arange(len(at))
            missing |= table[where] < 0
            number = number * len(at) + table[where]
        return np.where(missing, -1, number)

    def shapes_on(self, mesh: Mesh) -> list[tuple[int, ...] | None]:
        """The shape of each rank's own tensor; None where it has none, (n,) where it is flat."""
        shapes = self.shapes if self.lengths is None else self.lengths[:, None]
        return [None if v < 0 else tuple(shapes[v].tolist()) for v in self._virtual(mesh).tolist()]

    def holdings(self, mesh: Mesh, dtype: str, buffer: int) -> Holdings:
        """The columns of a layout whose places are the ranks of the mesh."""
        virtual = self._virtual(mesh)
        order = np.argsort(self.rank, kind="stable")
        counts = np.bincount(self.rank, minlength=len(self.shapes))
        begins = np.cumsum(counts) - counts
        held = np.where(virtual >= 0, counts[virtual], 0)
        places = np.repeat(np.arange(mesh.size, dtype=np.int32), held)
        nth = np.arange(len(places)) - np.repeat(np.cumsum(held) - held, held)
        rows: NDArray[np.intp] = order[np.repeat(begins[virtual], held) + nth]
        if self.starts is None or self.strides is None:
            wide = np.ones_like(self.shapes)
            if self.shapes.shape[1] > 1:
                wide[:, :-1] = np.cumprod(self.shapes[:, :0:-1], axis=1)[:, ::-1]
            strides = wide[self.rank]
            starts = (self.own * strides).sum(axis=1)
        else:
            starts, strides = self.starts, self.strides
        there = int((virtual >= 0).sum())
        copies = None if self.shared else there // self.ways
        return Holdings(
            self.shape,
            dtype,
            places,
            self.whole.take(rows),
            starts[rows],
            strides[rows],
            np.full(len(rows), buffer, dtype=np.int32),
            copies,
        )


def _in_front(number: Ints, boxes: Boxes) -> Boxes:
    """Boxes with one more dimension before the others, in which each is one index."""
    first = number.astype(np.int64)[:, None]
    return Boxes(
        np.concatenate([first, boxes.offsets], axis=1), np.concatenate([np.ones_like(first), boxes.sizes], axis=1)
    )


def _given(
    widths: tuple[int, ...] | tuple[tuple[int, ...], ...], ways: int, length: int, alike: bool
) -> tuple[Ints, Ints]:
    """(ways,) intervals of recorded widths."""
    if len(widths) != ways or not all(isinstance(width, int) for width in widths) or not alike:
        raise LayoutError(f"the widths {widths} are not one number for each of {ways} ranks")
    high = np.cumsum(np.array(widths, dtype=np.int64))
    if int(high[-1]) != length:
        raise LayoutError(f"the widths {widths} have {int(high[-1])} indices together, but {length} are cut")
    return high - np.array(widths, dtype=np.int64), high
