"""Who holds what: the regions of every tensor, and the places they live at."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from resilin.layout.boxes import Boxes
from resilin.layout.errors import LayoutError
from resilin.layout.holdings import Holdings
from resilin.layout.place import Place
from resilin.layout.region import Region


@dataclass(frozen=True)
class Holding:
    """One region of one tensor at one place.

    Attributes:
        tensor: its name.
        place: where.
        region: which elements.
        buffer: the memory at the place that it lies in.
        start: the address there of its first element, in elements.
        strides: elements from one index to the next.
    """

    tensor: str
    place: Place
    region: Region
    buffer: str
    start: int
    strides: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Layout:
    """Which region of which tensor lives at which places.

    Attributes:
        places: the table that holdings refer to, each place once.
        tensors: holdings by name. Tensors that lie alike may share one object, and a plan is then computed once.
        buffers: names of buffers that holdings refer to.
    """

    places: tuple[Place, ...]
    tensors: Mapping[str, Holdings]
    buffers: tuple[str, ...] = ()
    _rows: dict[Place, int] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        rows = {place: row for row, place in enumerate(self.places)}
        if len(rows) != len(self.places):
            twice = next(place for place in self.places if self.places.count(place) > 1)
            raise LayoutError(f"the table of places names {twice} twice")
        object.__setattr__(self, "_rows", rows)
        for name, held in self.tensors.items():
            for what, column, table in (("place", held.places, self.places), ("buffer", held.buffers, self.buffers)):
                if len(column) and int(column.max()) >= len(table):
                    raise LayoutError(f"tensor {name!r} refers to {what} {column.max()}, but there are {len(table)}")

    @classmethod
    def of(
        cls,
        tensors: Mapping[str, tuple[tuple[int, ...], str]],
        held: Iterable[tuple[str, Place, Region]],
        copies: int | None = None,
    ) -> Layout:
        """From a list of regions; a place has those of one tensor one after the other in one buffer.

        Args:
            tensors: name -> (shape, dtype).
            held: (tensor, place, region), in any order; empty regions are left out.
            copies: how often every element is to be held; None: at least once.

        Raises:
            LayoutError: for an unknown tensor, or a region that does not fit it.
        """
        places: dict[Place, int] = {}
        lists: dict[str, list[tuple[int, Region]]] = {name: [] for name in tensors}
        for name, place, region in held:
            if name not in lists:
                raise LayoutError(f"{place} holds {region} of {name!r}, which is none of the tensors")
            lists[name].append((places.setdefault(place, len(places)), region))
        made = {}
        for name, (shape, dtype) in tensors.items():
            try:
                made[name] = Holdings.of(shape, dtype, lists[name], copies)
            except LayoutError as error:
                raise LayoutError(f"tensor {name!r}: {error}") from None
        return cls(tuple(places), made)

    def __iter__(self) -> Iterator[Holding]:
        for name, held in self.tensors.items():
            yield from self._holdings(name, held, range(len(held)))

    def _holdings(self, name: str, held: Holdings, rows: Iterable[int]) -> Iterator[Holding]:
        for row in rows:
            buffer = int(held.buffers[row])
            yield Holding(
                name,
                self.places[held.places[row]],
                held.boxes.region(row),
                name if buffer < 0 else self.buffers[buffer],
                int(held.starts[row]),
                tuple(held.strides[row].tolist()),
            )

    def row(self, place: Place) -> int:
        """A place's row in the table.

        Raises:
            LayoutError: when the layout has no such place.
        """
        if place not in self._rows:
            raise LayoutError(f"this layout has no {place}; it has {', '.join(map(str, self.places[:8]))}, ...")
        return self._rows[place]

    def at(self, place: Place) -> list[Holding]:
        """Everything that a place holds."""
        row = self.row(place)
        return [
            holding
            for name, held in self.tensors.items()
            for holding in self._holdings(name, held, np.flatnonzero(held.places == row).tolist())
        ]

    @property
    def bytes(self) -> int:
        """Bytes of all tensors, each element once."""
        return sum(held.numel * held.item_bytes for held in self.tensors.values())

    def bytes_at(self) -> dict[Place, int]:
        """Bytes that each place holds, copies counted."""
        total = np.zeros(len(self.places), dtype=np.int64)
        seen: dict[int, np.ndarray] = {}
        for held in self.tensors.values():
            if id(held) not in seen:
                weights = (held.boxes.numel * held.item_bytes).astype(np.float64)
                seen[id(held)] = np.bincount(held.places, weights, minlength=len(self.places)).astype(np.int64)
            total += seen[id(held)]
        return dict(zip(self.places, total.tolist(), strict=True))

    def select(self, names: Iterable[str]) -> Layout:
        """The same places with some of the tensors.

        Raises:
            LayoutError: for a name that is none of them.
        """
        listed = list(names)
        unknown = [name for name in listed if name not in self.tensors]
        if unknown:
            raise LayoutError(f"this layout has no tensor {unknown[0]!r}")
        return Layout(self.places, {name: self.tensors[name] for name in listed}, self.buffers)

    def gathered(self, place: Place) -> Layout:
        """The same tensors, each whole at one place. Those of one shape and dtype share their holdings."""
        made: dict[tuple[tuple[int, ...], str], Holdings] = {}
        for held in self.tensors.values():
            key = held.shape, held.dtype
            if key not in made:
                made[key] = Holdings.of(held.shape, held.dtype, [(0, Region.whole(held.shape))], copies=1)
        return Layout((place,), {name: made[held.shape, held.dtype] for name, held in self.tensors.items()})

    def without(self, lost: Iterable[Place]) -> Layout:
        """What is left when places are gone: their holdings with them. Elements that only they held are missing then.

        Places keep their rows, so that a survivor's memory is still its own.
        """
        gone = np.zeros(len(self.places), dtype=bool)
        gone[[self.row(place) for place in lost]] = True
        made: dict[int, Holdings] = {}
        for held in self.tensors.values():
            if id(held) not in made:
                keep = ~gone[held.places]
                made[id(held)] = Holdings(
                    held.shape,
                    held.dtype,
                    held.places[keep],
                    held.boxes.take(keep),
                    held.starts[keep],
                    held.strides[keep],
                    held.buffers[keep],
                )
        return Layout(self.places, {name: made[id(held)] for name, held in self.tensors.items()}, self.buffers)


def merge(*layouts: Layout) -> Layout:
    """One layout of what several say of disjoint or the same tensors: survivors and snapshots, ranks and files.

    Raises:
        LayoutError: when two give a tensor another shape or dtype.
    """
    places: dict[Place, int] = {}
    buffers: dict[str, int] = {}
    columns: dict[str, list[Holdings]] = {}
    for layout in layouts:
        place_row = np.array([places.setdefault(p, len(places)) for p in layout.places], dtype=np.int32)
        buffer_row = np.array([buffers.setdefault(b, len(buffers)) for b in layout.buffers] + [-1], dtype=np.int32)
        for name, held in layout.tensors.items():
            others = columns.setdefault(name, [])
            if others and (others[0].shape, others[0].dtype) != (held.shape, held.dtype):
                raise LayoutError(
                    f"tensor {name!r} is {others[0].dtype} {list(others[0].shape)} in one layout and "
                    f"{held.dtype} {list(held.shape)} in another"
                )
            others.append(
                Holdings(
                    held.shape,
                    held.dtype,
                    place_row[held.places] if len(held) else held.places,
                    held.boxes,
                    held.starts,
                    held.strides,
                    buffer_row[held.buffers],
                    held.copies if len(layouts) == 1 else None,
                )
            )
    return Layout(tuple(places), {name: _joined(parts) for name, parts in columns.items()}, tuple(buffers))


def _joined(parts: list[Holdings]) -> Holdings:
    if len(parts) == 1:
        return parts[0]
    first = parts[0]
    return Holdings(
        first.shape,
        first.dtype,
        np.concatenate([p.places for p in parts]),
        Boxes(np.concatenate([p.boxes.offsets for p in parts]), np.concatenate([p.boxes.sizes for p in parts])),
        np.concatenate([p.starts for p in parts]),
        np.concatenate([p.strides for p in parts]),
        np.concatenate([p.buffers for p in parts]),
    )


def named(layout: Layout) -> Layout:
    """The same layout with every buffer in the table of names, so that tensors may be viewed under other names."""
    table = {name: row for row, name in enumerate(layout.buffers)}
    tensors = {}
    for name, held in layout.tensors.items():
        own = held.buffers < 0
        row = table.setdefault(name, len(table)) if own.any() else 0
        tensors[name] = replace(held, buffers=np.where(own, np.int32(row), held.buffers))
    return Layout(layout.places, tensors, tuple(table))
