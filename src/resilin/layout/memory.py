"""Carrying out a plan between numpy buffers of one process: the reference for every other executor, and for tests."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from resilin.layout.errors import LayoutError
from resilin.layout.layout import Holding, Layout
from resilin.layout.moves import Plan, Span
from resilin.layout.place import Place

Array = NDArray[Any]
Buffers = Mapping[Place, Mapping[str, Array]]


def view(buffer: Array, span: Span | Holding, sizes: tuple[int, ...]) -> Array:
    """The elements of a region that lies in a buffer, as an array of its sizes that shares the buffer's memory.

    Args:
        buffer: one-dimensional and contiguous.
        span: where the region lies.
        sizes: of the region.

    Raises:
        LayoutError: when it reaches past the buffer.
    """
    last = span.start + sum((size - 1) * stride for size, stride in zip(sizes, span.strides, strict=True))
    if all(sizes) and not 0 <= span.start <= last < len(buffer):
        raise LayoutError(
            f"{span.place}: elements {span.start} to {last} are asked of buffer {span.buffer!r}, "
            f"which has {len(buffer)}"
        )
    steps = tuple(stride * buffer.itemsize for stride in span.strides)
    seen: Array = np.lib.stride_tricks.as_strided(buffer[span.start :], sizes, steps)
    return seen


def apply(plan: Plan, source: Buffers, target: Buffers) -> None:
    """Copy every region of a plan.

    Args:
        plan: what to move.
        source: for each place of the source its buffers by name, one-dimensional.
        target: the same of the target; written in place. Source and target buffers must be different memory.

    Raises:
        LayoutError: for a buffer that is missing or too short.
    """
    for move in plan:
        ends = []
        for buffers, span in ((target, move.target), (source, move.source)):
            if span.place not in buffers or span.buffer not in buffers[span.place]:
                raise LayoutError(f"{span.place}: has no buffer {span.buffer!r}, which the plan needs")
            ends.append(view(buffers[span.place][span.buffer], span, move.region.sizes))
        ends[0][...] = ends[1]


def scatter(layout: Layout, tensors: Mapping[str, Array], fill: float = 0) -> dict[Place, dict[str, Array]]:
    """Buffers as each place would hold them.

    Args:
        layout: who holds what.
        tensors: the whole tensors by name.
        fill: what elements of a buffer hold that no region covers: padding.

    Raises:
        LayoutError: when two dtypes share a buffer.
    """
    sizes: dict[tuple[Place, str], tuple[int, np.dtype[Any]]] = {}
    for holding in layout:
        last = holding.start + sum((s - 1) * t for s, t in zip(holding.region.sizes, holding.strides, strict=True)) + 1
        dtype = tensors[holding.tensor].dtype
        size, before = sizes.get((holding.place, holding.buffer), (0, dtype))
        if before != dtype:
            raise LayoutError(f"{holding.place}: buffer {holding.buffer!r} would hold both {before} and {dtype}")
        sizes[holding.place, holding.buffer] = max(size, last), dtype
    buffers: dict[Place, dict[str, Array]] = {place: {} for place in layout.places}
    for (place, name), (size, dtype) in sizes.items():
        buffers[place][name] = np.full(size, fill, dtype=dtype)
    for holding in layout:
        buffer = buffers[holding.place][holding.buffer]
        view(buffer, holding, holding.region.sizes)[...] = tensors[holding.tensor][holding.region.slices]
    return buffers


def gather(layout: Layout, buffers: Buffers) -> dict[str, Array]:
    """The whole tensors, put together from what the places hold; elements that are nowhere are left as zeros."""
    made: dict[str, Array] = {}
    for holding in layout:
        buffer = buffers[holding.place][holding.buffer]
        if holding.tensor not in made:
            made[holding.tensor] = np.zeros(layout.tensors[holding.tensor].shape, dtype=buffer.dtype)
        made[holding.tensor][holding.region.slices] = view(buffer, holding, holding.region.sizes)
    return made
