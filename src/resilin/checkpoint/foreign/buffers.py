"""Tensors of opened files, kept as the buffers that a layout speaks of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from resilin.checkpoint.errors import CheckpointError
from resilin.checkpoint.foreign.pickles import buffer_of
from resilin.checkpoint.foreign.shards import LayoutBuilder, Slice
from resilin.checkpoint.foreign.stored import OTHER, dtype_name
from resilin.checkpoint.tree import escape
from resilin.layout import Place, file


class Gathered:
    """A layout in the making, together with the (mapped) tensors it is about."""

    def __init__(self) -> None:
        self.builder = LayoutBuilder()
        self._rows: dict[tuple[Place, str], Tensor] = {}

    def read(self, place: Place, buffer: str) -> Tensor:
        """A buffer as a row of elements."""
        return self._rows[place, buffer]

    def keep(self, name: str, where: str, buffer: str, tensor: Tensor, slice_: Slice) -> None:
        """A shard that is a tensor of its own.

        Args:
            name: of the whole, declared with `builder.tensor`.
            where: the file.
            buffer: what to call the shard's memory there.
            tensor: the shard.
            slice_: what it is of the whole.

        Raises:
            CheckpointError: it has another shape than the slice.
        """
        if tuple(tensor.shape) != slice_.shape:
            raise CheckpointError(f"{where}: {buffer} of {name!r} is {list(tensor.shape)}, not {list(slice_.shape)}")
        self._rows[file(where), buffer] = buffer_of(tensor)
        self.builder.shard(name, file(where), buffer, slice_, int(tensor.storage_offset()), tensor.stride())

    def keep_flat(
        self, name: str, where: str, buffer: str, row: Tensor, at: int, slice_: Slice, flat: tuple[int, int]
    ) -> None:
        """A part of a shard in a flat buffer.

        Args:
            name: of the whole, declared with `builder.tensor`.
            where: the file.
            buffer: what to call the flat buffer there.
            row: the flat buffer.
            at: the index in it of the first element.
            slice_: what the shard is of the whole.
            flat: the shard's elements [first, end) that are there.

        Raises:
            CheckpointError: the buffer is too short.
        """
        if at + flat[1] - flat[0] > row.numel():
            raise CheckpointError(
                f"{where}: {buffer} has {row.numel()} elements, but {name!r} should reach to element "
                f"{at + flat[1] - flat[0]}: the file is of another checkpoint, or was changed"
            )
        self._rows[file(where), buffer] = buffer_of(row)
        self.builder.shard(name, file(where), buffer, slice_, int(row.storage_offset()) + at, flat=flat)

    def whole(self, name: str, where: str, buffer: str, tensor: Tensor, copies: int | None = 1) -> None:
        """A tensor that one file holds in one piece."""
        self.builder.tensor(name, tuple(tensor.shape), dtype_name(tensor, f"{where}: {name}"), copies)
        self.keep(name, where, buffer, tensor, Slice.whole(tuple(tensor.shape)))

    def marked(self, tree: Any, where: str, path: tuple[str, ...] = ()) -> Any:
        """A tree of other values, its tensors kept under `other/...` and replaced by marks that name them."""
        if isinstance(tree, Tensor):
            name = OTHER + "/".join(escape(key) for key in path)
            self.whole(name, where, name, tree, copies=None)
            return {"$tensor": name}
        if isinstance(tree, dict):
            return {key: self.marked(item, where, (*path, key)) for key, item in tree.items()}
        if isinstance(tree, list):
            return [self.marked(item, where, (*path, str(number))) for number, item in enumerate(tree)]
        return tree


def as_tensor(value: Tensor | float | int) -> Tensor:
    """A step counter as the tensor that torch's optimizers keep: float32 without dimensions."""
    if isinstance(value, Tensor):
        return value.reshape(()) if value.numel() == 1 else value
    return torch.tensor(float(value))


def same_everywhere(values: Sequence[tuple[str, object]], what: str) -> object:
    """The one value that all files have.

    Raises:
        CheckpointError: naming two files that differ.
    """
    first_file, first = values[0]
    for other_file, other in values[1:]:
        if not equal(first, other):
            raise CheckpointError(f"{what} of {first_file} and {other_file} differ: they are of different checkpoints")
    return first


def equal(a: object, b: object) -> bool:
    """Whether two trees of values and tensors are the same."""
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return isinstance(a, Tensor) and isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(equal(x, y) for x, y in zip(a, b, strict=True))
    return type(a) is type(b) and a == b
