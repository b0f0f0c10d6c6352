"""What a plan says is to be moved: one region of one tensor from one place to another."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from resilin.layout.boxes import Boxes, Ints
from resilin.layout.layout import Layout
from resilin.layout.place import Place
from resilin.layout.region import Region


@dataclass(frozen=True)
class Span:
    """Where a moved region lies at one end: element `index` of it is at `start + index . strides` of the buffer."""

    place: Place
    buffer: str
    start: int
    strides: tuple[int, ...]


@dataclass(frozen=True)
class Move:
    """One region to be copied.

    Attributes:
        tensor: whose elements.
        region: which of them.
        source: where they are.
        target: where they are wanted.
        bytes: how many.
        local: both ends are the same place; nothing crosses a wire.
    """

    tensor: str
    region: Region
    source: Span
    target: Span
    bytes: int
    local: bool


@dataclass(frozen=True, eq=False)
class TensorMoves:
    """The moves of one tensor in columns, K of them.

    Attributes:
        source: (K,) rows of the source's holdings.
        target: (K,) rows of the target's holdings.
        boxes: the regions.
        local: (K,) whether both ends are the same place.
    """

    source: Ints
    target: Ints
    boxes: Boxes
    local: NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.source)


@dataclass(frozen=True, eq=False)
class Plan:
    """How one layout becomes another.

    Attributes:
        source: the layout there is.
        target: the layout that is wanted.
        moves: by tensor, in the target's order.
    """

    source: Layout
    target: Layout
    moves: Mapping[str, TensorMoves]

    def __len__(self) -> int:
        return sum(len(moves) for moves in self.moves.values())

    def __iter__(self) -> Iterator[Move]:
        for name in self.moves:
            yield from self.of(name)

    def of(self, name: str) -> Iterator[Move]:
        """The moves of one tensor."""
        moves, ends = self.moves[name], []
        for layout, rows in ((self.source, moves.source), (self.target, moves.target)):
            held = layout.tensors[name]
            starts = held.addresses(rows, moves.boxes).tolist()
            ends.append(
                [
                    Span(
                        layout.places[place],
                        name if buffer < 0 else layout.buffers[buffer],
                        start,
                        tuple(strides),
                    )
                    for place, buffer, start, strides in zip(
                        held.places[rows].tolist(),
                        held.buffers[rows].tolist(),
                        starts,
                        held.strides[rows].tolist(),
                        strict=True,
                    )
                ]
            )
        size = self.source.tensors[name].item_bytes
        for region, source, target, local in zip(moves.boxes, *ends, moves.local.tolist(), strict=True):
            yield Move(name, region, source, target, region.numel * size, local)

    def _bytes(self, name: str) -> Ints:
        return self.moves[name].boxes.numel * self.source.tensors[name].item_bytes

    @property
    def local_bytes(self) -> int:
        """Bytes that are already at the place that wants them."""
        return sum(int(self._bytes(name)[moves.local].sum()) for name, moves in self.moves.items())

    @property
    def moved_bytes(self) -> int:
        """Bytes that go from one place to another."""
        return sum(int(self._bytes(name)[~moves.local].sum()) for name, moves in self.moves.items())

    def sent(self) -> dict[Place, int]:
        """Bytes that each place of the source sends to others."""
        return self._totals(self.source, "source")

    def received(self) -> dict[Place, int]:
        """Bytes that each place of the target gets from others."""
        return self._totals(self.target, "target")

    def _totals(self, layout: Layout, end: str) -> dict[Place, int]:
        total = np.zeros(len(layout.places))
        for name, moves in self.moves.items():
            places = layout.tensors[name].places[getattr(moves, end)[~moves.local]]
            total += np.bincount(places, self._bytes(name)[~moves.local], minlength=len(total))
        return dict(zip(layout.places, total.astype(np.int64).tolist(), strict=True))
