"""From the shards of other tools to holdings: what a tensor-parallel slice, or a flat range of one, is of the whole."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from resilin.checkpoint.errors import CheckpointError
from resilin.layout import Boxes, Holdings, Layout, LayoutError, Place, Region, check, flat_range, row_major

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Piece:
    """A box of a shard, and where its first element is in the whole tensor."""

    local: Region
    offsets: Shape

    def clipped(self, rows: int) -> Piece | None:
        """Without what lies beyond so many rows of the whole: padding."""
        keep = min(self.local.sizes[0], rows - self.offsets[0])
        if keep <= 0:
            return None
        return Piece(Region(self.local.offsets, (keep, *self.local.sizes[1:])), self.offsets)


@dataclass(frozen=True)
class Slice:
    """What the tensor of one tensor-parallel rank is of the whole.

    Attributes:
        shape: of the shard.
        pieces: disjoint; elements of the shard in none of them are padding.
    """

    shape: Shape
    pieces: tuple[Piece, ...]

    @classmethod
    def whole(cls, shape: Sequence[int]) -> Slice:
        """A shard that is the tensor."""
        return cls(tuple(shape), (Piece(Region.whole(shape), (0,) * len(shape)),))


@dataclass
class _Columns:
    shape: Shape
    dtype: str
    copies: int | None
    places: list[int] = field(default_factory=list)
    boxes: list[Region] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)
    strides: list[Shape] = field(default_factory=list)
    buffers: list[int] = field(default_factory=list)


class LayoutBuilder:
    """Collects, shard by shard, where the elements of a checkpoint's tensors lie."""

    def __init__(self) -> None:
        self._tensors: dict[str, _Columns] = {}
        self._places: dict[Place, int] = {}
        self._buffers: dict[str, int] = {}

    def tensor(self, name: str, shape: Sequence[int], dtype: str, copies: int | None = 1) -> None:
        """Say of a tensor what it is, before its shards; again where another file holds more of it.

        Args:
            name: its name.
            shape: of the whole.
            dtype: its name in safetensors.
            copies: how often each element should be there; None: any number from one up.

        Raises:
            CheckpointError: when an earlier file said otherwise.
        """
        known = self._tensors.setdefault(name, _Columns(tuple(shape), dtype, copies))
        if (known.shape, known.dtype) != (tuple(shape), dtype):
            raise CheckpointError(
                f"tensor {name!r} is {known.dtype} {list(known.shape)} in one file and {dtype} {list(shape)} in another"
            )

    def shard(
        self,
        name: str,
        place: Place,
        buffer: str,
        slice_: Slice,
        start: int,
        strides: Sequence[int] | None = None,
        flat: tuple[int, int] | None = None,
    ) -> None:
        """Add what a file holds of a tensor.

        Args:
            name: of the tensor.
            place: the file.
            buffer: which of the file's buffers.
            slice_: what the shard is of the whole.
            start: address in the buffer: of the shard's first element, or of the first of the flat range.
            strides: of the shard in the buffer; None: it is contiguous.
            flat: the buffer has only these elements [first, end) of the shard, in row-major order.
        """
        steps = tuple(strides) if strides is not None else row_major(slice_.shape)
        there = [Region.whole(slice_.shape)]
        if flat is not None:
            there = list(flat_range(slice_.shape, *flat))
            start -= flat[0]
        columns = self._tensors[name]
        for box in there:
            for piece in slice_.pieces:
                part = box & piece.local
                if part.numel == 0:
                    continue
                shift = [o - p for o, p in zip(piece.offsets, piece.local.offsets, strict=True)]
                columns.places.append(self._places.setdefault(place, len(self._places)))
                columns.boxes.append(part.shifted(shift))
                columns.starts.append(start + sum(o * s for o, s in zip(part.offsets, steps, strict=True)))
                columns.strides.append(steps)
                columns.buffers.append(self._buffers.setdefault(buffer, len(self._buffers)))

    def layout(self, where: object) -> Layout:
        """Everything together, counted: no element is missing, none is there too often.

        Raises:
            CheckpointError: naming the tensor and the elements.
        """
        try:
            made = Layout(
                tuple(self._places),
                {name: _holdings(columns) for name, columns in self._tensors.items()},
                tuple(self._buffers),
            )
            check(made)
        except LayoutError as error:
            raise CheckpointError(f"{where}: {error}") from None
        return made


def _holdings(columns: _Columns) -> Holdings:
    dims = len(columns.shape)
    copies = columns.copies if math.prod(columns.shape) else None
    return Holdings(
        columns.shape,
        columns.dtype,
        np.array(columns.places, dtype=np.int32),
        Boxes.of(columns.boxes, dims),
        np.array(columns.starts, dtype=np.int64),
        np.array(columns.strides, dtype=np.int64).reshape(len(columns.boxes), dims),
        np.array(columns.buffers, dtype=np.int32),
        copies,
    )
