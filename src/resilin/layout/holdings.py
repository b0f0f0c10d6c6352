"""Which regions of one tensor live where, and at which addresses: the columns of a layout."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from resilin.layout.boxes import Boxes, Ints
from resilin.layout.errors import LayoutError
from resilin.layout.region import Region

ITEM_BYTES: Mapping[str, int] = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 8),
    **dict.fromkeys(("F32", "I32", "U32"), 4),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 2),
    **dict.fromkeys(("F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "F8_E8M0", "I8", "U8", "BOOL"), 1),
}
"""Bytes of an element, by the names that safetensors has for dtypes."""


@dataclass(frozen=True, eq=False)
class Holdings:
    """All copies of all regions of one tensor. Shapes: N holdings, D dimensions.

    A holding is a box of the tensor in the memory of one place. There it lies in a buffer, whose elements are counted
    from zero: element `index` of the box is at `start + index . strides`. So one shape serves a plain shard, the
    three parts of a fused projection, and a range of a flat optimizer buffer. Objects may be shared by the many
    tensors of a model that lie alike: nothing here says which tensor it is.

    Attributes:
        shape: of the whole tensor, without padding.
        dtype: the name of its element type in safetensors.
        places: (N,) rows of the layout's table of places.
        boxes: the regions.
        starts: (N,) address of each box's first element, in elements.
        strides: (N, D) elements from one index to the next.
        buffers: (N,) rows of the layout's table of buffer names; -1 is the buffer that has the tensor's own name.
        copies: how often every element is held by declaration; None: not said, any number from one up.
    """

    shape: tuple[int, ...]
    dtype: str
    places: NDArray[np.int32]
    boxes: Boxes
    starts: Ints
    strides: Ints
    buffers: NDArray[np.int32]
    copies: int | None = None

    def __post_init__(self) -> None:
        if self.dtype not in ITEM_BYTES:
            raise LayoutError(f"dtype {self.dtype!r} is unknown: use one of {', '.join(ITEM_BYTES)}")
        outside = (self.boxes.ends > np.array(self.shape, dtype=np.int64)).any(axis=1)
        if outside.any():
            row = int(outside.argmax())
            raise LayoutError(f"region {self.boxes.region(row)} reaches outside a tensor of shape {list(self.shape)}")

    @classmethod
    def of(
        cls, shape: Sequence[int], dtype: str, held: Iterable[tuple[int, Region]], copies: int | None = None
    ) -> Holdings:
        """From (row in the table of places, region) pairs; a place has its regions one after the other in one buffer.

        Raises:
            LayoutError: for a region outside the tensor, or an unknown dtype.
        """
        pairs = [(place, region) for place, region in held if region.numel]
        boxes = Boxes.of([region for _, region in pairs], len(shape))
        starts, used = [], dict.fromkeys((place for place, _ in pairs), 0)
        for place, region in pairs:
            starts.append(used[place])
            used[place] += region.numel
        return cls(
            tuple(shape),
            dtype,
            np.array([place for place, _ in pairs], dtype=np.int32),
            boxes,
            np.array(starts, dtype=np.int64),
            contiguous(boxes.sizes),
            np.full(len(pairs), -1, dtype=np.int32),
            copies,
        )

    def __len__(self) -> int:
        return len(self.places)

    @property
    def numel(self) -> int:
        """Elements of the whole tensor."""
        return math.prod(self.shape)

    @property
    def item_bytes(self) -> int:
        """Bytes of an element."""
        return ITEM_BYTES[self.dtype]

    def addresses(self, rows: Ints, boxes: Boxes) -> Ints:
        """(K,) where the first elements of K boxes lie, each inside the holding of its row."""
        into: Ints = ((boxes.offsets - self.boxes.offsets[rows]) * self.strides[rows]).sum(axis=1)
        return self.starts[rows] + into


def contiguous(sizes: Ints) -> Ints:
    """(N, D) row-major strides of N boxes that each lie alone in a buffer."""
    strides = np.ones_like(sizes)
    if sizes.shape[1] > 1:
        strides[:, :-1] = np.cumprod(sizes[:, :0:-1], axis=1)[:, ::-1]
    return strides
