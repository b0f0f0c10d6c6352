"""Which byte ranges of a piece have to be read for a region of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from resilin.layout import Region, row_major

SPARSE = 4
"""How many times more than is wanted may be read in one go before the rows are fetched one by one."""


def spans(sizes: Sequence[int], region: Region, *, limit: int, row: int) -> Iterator[tuple[Region, int, int]]:
    """Parts of a region with the ranges of the row-major piece that hold them, in order; all counted in elements.

    A range holds what lies between the part's rows too: reading that is cheaper than asking for each row, unless the
    rows are long and little of them is wanted.

    Args:
        sizes: of the piece.
        region: what is wanted, inside a piece that begins at zero.
        limit: of a range; it bounds the memory of whoever reads.
        row: elements from which a row that is mostly unwanted is not read whole.
    """
    if region.numel == 0:
        return
    strides = row_major(sizes)
    first = sum(o * s for o, s in zip(region.offsets, strides, strict=True))
    end = sum((e - 1) * s for e, s in zip(region.ends, strides, strict=True)) + 1
    dim = next((d for d, size in enumerate(region.sizes) if size > 1), None)
    if dim is None:
        yield region, first, end
        return
    sparse = end - first > SPARSE * region.numel and strides[dim] >= row
    if end - first <= limit and not sparse:
        yield region, first, end
        return
    step = 1 if sparse else max(1, limit // strides[dim])
    for start in range(0, region.sizes[dim], step):
        offsets, part = list(region.offsets), list(region.sizes)
        offsets[dim] += start
        part[dim] = min(step, region.sizes[dim] - start)
        inner = Region(tuple(offsets), tuple(part))
        if part[dim] == 1:
            yield from spans(sizes, inner, limit=limit, row=row)
        else:
            low = first + start * strides[dim]
            yield inner, low, low + (end - first) - (region.sizes[dim] - part[dim]) * strides[dim]
