"""A rank's share of a save, and its part of a load: from its tree of local tensors and the layout of all ranks.

A leaf of the tree is the rank's buffer for the tensor of that name: the elements of its regions lie in it where the
layout says (`Holding.start` and `Holding.strides`, counted in the flattened buffer). Elements of the buffer that no
region covers are padding; they are neither written nor read.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from resilin.checkpoint.errors import CheckpointError
from resilin.checkpoint.share import Piece, Share, check_tensor
from resilin.checkpoint.tensor_record import DTYPE_NAMES, DTYPES, layout_dtype
from resilin.checkpoint.tree import TakenApart
from resilin.layout import Holding, Layout, LayoutError, Place, Region, check, file, plan, rank
from resilin.nouns import Deferred

Buffers = Mapping[str, Tensor]


@dataclass(frozen=True)
class Owned:
    """A region that one rank writes, and where it lies there.

    Attributes:
        tensor: its name.
        region: which elements.
        buffer: the memory of the rank that it lies in.
        start: the address there, in elements.
        strides: elements from one index to the next.
    """

    tensor: str
    region: Region
    buffer: str
    start: int
    strides: tuple[int, ...]


def owned(layout: Layout, place: Place) -> list[Owned]:
    """What a place writes so that all places together write every element once, each about as many bytes.

    Pure: every rank computes the same and takes its own. Of regions that several places hold, each writes a share.

    Raises:
        LayoutError: naming a tensor of which elements are held by no place, or not as often as declared.
    """
    check(layout)
    whole = layout.gathered(file("all"))
    found: list[Owned] = []
    if place not in layout.places:
        return found
    row = layout.row(place)
    for name, moves in plan(layout, whole).moves.items():
        held = layout.tensors[name]
        mine = np.flatnonzero(held.places[moves.source] == row)
        rows, boxes = moves.source[mine], moves.boxes.take(mine)
        columns = zip(
            boxes, held.buffers[rows].tolist(), held.addresses(rows, boxes).tolist(), held.strides[rows], strict=True
        )
        for region, buffer, start, strides in columns:
            lies_in = name if buffer < 0 else layout.buffers[buffer]
            found.append(Owned(name, region, lies_in, start, tuple(strides.tolist())))
    return found


def digest(layout: Layout) -> str:
    """A short text that is equal for equal layouts."""
    value = zlib.crc32(repr((layout.places, layout.buffers)).encode())
    for name, held in layout.tensors.items():
        value = zlib.crc32(repr((name, held.shape, held.dtype)).encode(), value)
        for column in (held.places, held.boxes.offsets, held.boxes.sizes, held.starts, held.strides, held.buffers):
            value = zlib.crc32(np.ascontiguousarray(column).tobytes(), value)
    return f"{value:08x}"


def _read(tensor: Tensor | Deferred) -> Tensor:
    return tensor.read() if isinstance(tensor, Deferred) else tensor


def local_view(
    tensor: str, buffer: Tensor | Deferred, start: int, strides: tuple[int, ...], sizes: tuple[int, ...]
) -> Tensor:
    """A region as it lies in a buffer, sharing its memory where the buffer is contiguous.

    Raises:
        CheckpointError: when it reaches past the buffer.
    """
    _check_inside(tensor, buffer, start, strides, sizes)
    flat = _read(buffer).detach().contiguous().reshape(-1)
    return flat.as_strided(sizes, strides, flat.storage_offset() + start)


def _check_inside(
    tensor: str, buffer: Tensor | Deferred, start: int, strides: tuple[int, ...], sizes: tuple[int, ...]
) -> None:
    last = start + sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True))
    if all(sizes) and not 0 <= start <= last < math.prod(buffer.shape):
        raise CheckpointError(
            f"tensor {tensor!r}: the layout says that elements {start} to {last} of this rank's buffer belong to it, "
            f"but the buffer has {math.prod(buffer.shape)} ({list(buffer.shape)})"
        )


def rank_share(
    apart: TakenApart,
    layout: Layout,
    place: Place,
    buffers: Buffers | None,
    writes: list[Owned],
) -> Share:
    """The share of one of several ranks.

    Args:
        apart: the rank's tree; its tensors are the rank's buffers, its values must be equal on all ranks that have
            them. 0-d tensors that the layout does not list are taken to be on every rank.
        layout: of all ranks; its tensors are named as in the tree, keys joined by `/`.
        place: this rank's.
        buffers: the named buffers of the layout (flat optimizer memory).
        writes: what `owned` said for this layout and place.

    Raises:
        CheckpointError: for a tensor that is not in the layout, or a buffer that does not fit it, by name.
    """
    tensors, late = apart.tensors, []
    scalars: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        check_tensor(name, tensor)
        if name in layout.tensors:
            held = layout.tensors[name]
            if held.shape == () and place in layout.places:
                for at in held.starts[held.places == layout.row(place)][:1].tolist():
                    scalars[name] = local_view(name, tensor, at, (), ())
        elif not tensor.shape:
            scalars[name] = _read(tensor)
        elif math.prod(tensor.shape):
            late.append(name)
    if late:
        raise CheckpointError(
            f"tensor {late[0]!r} is not in the layout, so nobody knows which part of it this rank holds: add it (a "
            "state of a parameter's shape lies like the parameter; declare the rule of any other), or leave it out"
        )
    memory: dict[str, Tensor | Deferred] = {**tensors, **(buffers or {})}
    pieces: list[Piece] = []
    for one in writes:
        held = layout.tensors[one.tensor]
        buffer = memory.get(one.buffer)
        if buffer is None:
            raise CheckpointError(
                f"tensor {one.tensor!r}: {place} has no buffer {one.buffer!r}, where the layout has it"
            )
        dtype = DTYPE_NAMES[buffer.dtype]
        if layout_dtype(dtype) != held.dtype:
            raise CheckpointError(f"tensor {one.tensor!r} is {held.dtype} in the layout, but {dtype} at {place}")
        # Whatever does not fit is found before anything is written.
        _check_inside(one.tensor, buffer, one.start, one.strides, one.region.sizes)
        read = partial(local_view, one.tensor, buffer, one.start, one.strides, one.region.sizes)
        pieces.append(Piece(one.tensor, buffer.dtype, held.shape, one.region, read))
    if place == rank(0):  # no element, so no owner: but the tensor is there, with its shape
        for name, held in layout.tensors.items():
            if held.numel == 0 and name in tensors:
                read = partial(torch.empty, held.shape, dtype=tensors[name].dtype)
                pieces.append(Piece(name, tensors[name].dtype, held.shape, Region.whole(held.shape), read))
    return Share(apart.json, tuple(pieces), scalars, frozenset(scalars) - set(layout.tensors), digest(layout))


def wanted_buffers(
    layout: Layout, place: Place, names: list[str], dtypes: Mapping[str, str]
) -> tuple[dict[str, Tensor], dict[str, list[tuple[Region, Tensor]]]]:
    """Memory for what a place is to hold, zeros where there is padding, and the regions of each tensor in it.

    Args:
        layout: of all ranks.
        place: whose part.
        names: of the tensors.
        dtypes: of each, as the checkpoint has them.

    Returns:
        Buffers by name (a region that fills its buffer gives it its shape), and for each tensor the views to fill.
    """
    mine = layout.select(names).at(place) if place in layout.places else []
    sizes: dict[str, int] = {}
    kinds: dict[str, str] = {}
    for holding in mine:
        sizes[holding.buffer] = max(sizes.get(holding.buffer, 0), _last(holding) + 1)
        if kinds.setdefault(holding.buffer, dtypes[holding.tensor]) != dtypes[holding.tensor]:
            raise LayoutError(f"{place}: buffer {holding.buffer!r} would hold tensors of different dtypes")
    memory = {name: torch.zeros(size, dtype=DTYPES[kinds[name]]) for name, size in sizes.items()}
    views: dict[str, list[tuple[Region, Tensor]]] = {}
    for holding in mine:
        view = memory[holding.buffer].as_strided(holding.region.sizes, holding.strides, holding.start)
        views.setdefault(holding.tensor, []).append((holding.region, view))
    for name, found in views.items():
        if name in memory and len(found) == 1 and found[0][1].is_contiguous() and found[0][1].numel() == sizes[name]:
            memory[name] = found[0][1]
    for name in names:
        if name not in views:
            shape = layout.tensors[name].shape
            memory[name] = torch.empty((0, *shape[1:]) if shape else (0,), dtype=DTYPES[dtypes[name]])
    return memory, views


def _last(holding: Holding) -> int:
    return holding.start + sum((s - 1) * t for s, t in zip(holding.region.sizes, holding.strides, strict=True))
