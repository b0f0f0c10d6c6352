"""The same memory under other names: a fused tensor as the ones it is made of, separate experts as one stack.

Holdings say where elements lie, so a view is new columns over old addresses: nothing is copied. A layout whose tensors
are q, k and v then plans its way to one where they are fused, and back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from resilin.layout.boxes import Boxes, concatenate
from resilin.layout.errors import LayoutError
from resilin.layout.holdings import Holdings


def pick(held: Holdings, dim: int, runs: Sequence[tuple[int, int]]) -> Holdings:
    """The tensor made of some index runs of another, side by side in one dimension.

    A query projection out of a fused one is one run; out of one that is interleaved by groups of heads, one run for
    each group.

    Args:
        held: the tensor's holdings.
        dim: in which dimension.
        runs: (first index, count), in the order in which they lie in the result.

    Raises:
        LayoutError: for runs that reach outside the tensor.
    """
    length = held.shape[dim]
    if any(first < 0 or count < 1 or first + count > length for first, count in runs):
        raise LayoutError(f"runs {runs} do not lie in dimension {dim} of a tensor of shape {list(held.shape)}")
    firsts, counts = (np.array(column, dtype=np.int64) for column in zip(*runs, strict=True))
    bases = np.cumsum(counts) - counts
    begin, size = held.boxes.offsets[:, dim, None], held.boxes.sizes[:, dim, None]
    low, high = np.maximum(firsts, begin), np.minimum(firsts + counts, begin + size)
    row, run = np.nonzero(low < high)
    offsets, sizes = held.boxes.offsets[row].copy(), held.boxes.sizes[row].copy()
    starts = held.starts[row] + (low[row, run] - offsets[:, dim]) * held.strides[row, dim]
    offsets[:, dim] = low[row, run] - firsts[run] + bases[run]
    sizes[:, dim] = high[row, run] - low[row, run]
    shape = (*held.shape[:dim], int(counts.sum()), *held.shape[dim + 1 :])
    return replace(
        held,
        shape=shape,
        places=held.places[row],
        boxes=Boxes(offsets, sizes),
        starts=starts,
        strides=held.strides[row],
        buffers=held.buffers[row],
    )


def join(parts: Sequence[Holdings], dim: int) -> Holdings:
    """Several tensors as one, side by side in a dimension.

    Their buffers must have names of their own (`Holdings.buffers` not -1), since the joined tensor has another.

    Raises:
        LayoutError: when they do not fit, or lie in buffers that have the tensors' own names.
    """
    first = parts[0]
    for part in parts[1:]:
        others = [(p.dtype, p.shape[:dim], p.shape[dim + 1 :]) for p in (first, part)]
        if others[0] != others[1]:
            raise LayoutError(
                f"{first.dtype} {list(first.shape)} and {part.dtype} {list(part.shape)} cannot be joined in "
                f"dimension {dim}"
            )
    base, moved = 0, []
    for part in parts:
        offsets = part.boxes.offsets.copy()
        offsets[:, dim] += base
        base += part.shape[dim]
        moved.append(Boxes(offsets, part.boxes.sizes))
    return _one(parts, (*first.shape[:dim], base, *first.shape[dim + 1 :]), concatenate(moved), first.strides.shape[1])


def stack(parts: Sequence[Holdings]) -> Holdings:
    """Several tensors of one shape as one with a new first dimension: experts 0, 1, 2, ...

    Raises:
        LayoutError: when they differ in shape or dtype, or lie in buffers that have the tensors' own names.
    """
    lifted = []
    for part in parts:
        ones = np.ones((len(part), 1), dtype=np.int64)
        offsets = np.concatenate([np.zeros_like(ones), part.boxes.offsets], axis=1)
        sizes = np.concatenate([ones, part.boxes.sizes], axis=1)
        strides = np.concatenate([np.zeros_like(ones), part.strides], axis=1)
        lifted.append(replace(part, shape=(1, *part.shape), boxes=Boxes(offsets, sizes), strides=strides))
    return join(lifted, 0)


def unstack(held: Holdings) -> list[Holdings]:
    """A tensor as those along its first dimension."""
    parts = []
    for number in range(held.shape[0]):
        part = pick(held, 0, [(number, 1)])
        boxes = Boxes(part.boxes.offsets[:, 1:], part.boxes.sizes[:, 1:])
        parts.append(replace(part, shape=part.shape[1:], boxes=boxes, strides=part.strides[:, 1:]))
    return parts


def _one(parts: Sequence[Holdings], shape: tuple[int, ...], boxes: Boxes, dims: int) -> Holdings:
    if any((part.buffers < 0).any() for part in parts):
        raise LayoutError("tensors in buffers of their own names cannot be joined: name the buffers first (`named`)")
    copies = {part.copies for part in parts}
    return Holdings(
        shape,
        parts[0].dtype,
        np.concatenate([part.places for part in parts]),
        boxes,
        np.concatenate([part.starts for part in parts]),
        np.concatenate([part.strides for part in parts]).reshape(-1, dims),
        np.concatenate([part.buffers for part in parts]),
        copies.pop() if len(copies) == 1 else None,
    )
