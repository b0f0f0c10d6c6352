"""The algebra of boxes, against sets of indices."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from layout_strategies import regions, shapes, tilings

from resilin.layout import LayoutError, Region, flat_range, missing, row_major, tiles


def elements(region: Region) -> set[tuple[int, ...]]:
    return set(itertools.product(*(range(o, o + s) for o, s in zip(region.offsets, region.sizes, strict=True))))


@st.composite
def two_regions(draw: st.DrawFn) -> tuple[tuple[int, ...], Region, Region]:
    shape = draw(shapes)
    return shape, draw(regions(shape)), draw(regions(shape))


@given(two_regions())
def test_intersection_and_containment_are_those_of_sets(case):
    _, a, b = case
    assert elements(a & b) == elements(a) & elements(b)
    assert (b in a) == (elements(b) <= elements(a))


@given(two_regions())
def test_a_difference_is_disjoint_boxes_of_what_the_other_lacks_in_order_of_position(case):
    shape, a, b = case
    rest = a - b
    assert sum(box.numel for box in rest) == len(elements(a) - elements(b))
    assert set().union(*map(elements, rest)) == elements(a) - elements(b)
    assert len(rest) <= max(1, 2 * len(shape))
    assert list(rest) == sorted(rest)


@given(two_regions())
def test_a_region_counted_from_the_first_element_of_a_larger_one(case):
    _, a, b = case
    inner = a & b
    if inner.numel == 0:
        return
    seen = inner.inside(a)
    assert seen.sizes == inner.sizes
    assert seen.shifted(a.offsets) == inner
    if inner != b:
        with pytest.raises(LayoutError, match="is not inside"):
            b.inside(inner)


@given(st.data())
def test_runs_of_a_region_are_its_elements_in_memory_order(data):
    shape = data.draw(shapes)
    region = data.draw(regions(shape))
    positions = [sum(i * s for i, s in zip(index, row_major(shape), strict=True)) for index in elements(region)]
    runs = list(region.flat(shape))
    assert [p for first, count in runs for p in range(first, first + count)] == sorted(positions)


@given(st.data())
def test_a_flat_range_is_its_elements_in_few_boxes(data):
    shape = data.draw(shapes)
    total = int(np.prod(shape))
    start = data.draw(st.integers(0, total))
    end = data.draw(st.integers(start, total))
    boxes = flat_range(shape, start, end)
    order = np.arange(total).reshape(shape)
    assert [i for box in boxes for i in order[box.slices].reshape(-1)] == list(range(start, end))
    assert len(boxes) <= max(1, 2 * len(shape) - 1)
    with pytest.raises(LayoutError, match=f"has {total} elements"):
        flat_range(shape, start, total + 1)


@given(st.data())
def test_a_tiling_has_no_gap_and_no_overlap_and_losing_or_doubling_a_part_shows(data):
    shape = data.draw(shapes)
    whole, parts = Region.whole(shape), data.draw(tilings(shape))
    assert tiles(whole, parts)
    assert not missing(whole, parts)
    lost = data.draw(st.integers(0, len(parts) - 1))
    fewer = parts[:lost] + parts[lost + 1 :]
    assert not tiles(whole, fewer)
    assert set().union(*map(elements, missing(whole, fewer))) == elements(parts[lost])
    assert not tiles(whole, [*parts, parts[lost]])


def test_slices_there_and_back_and_open_ones_refused():
    region = Region((1, 2), (3, 0))
    assert str(region) == "[1:4, 2:2]"
    assert Region.of_slices(region.slices) == region
    for bad in (slice(None, 3), slice(0, 4, 2)):
        with pytest.raises(LayoutError, match="no region"):
            Region.of_slices([bad])
    with pytest.raises(LayoutError, match="negative"):
        Region((-1,), (2,))
    with pytest.raises(LayoutError, match="different numbers"):
        Region((0,), (1,)) & Region((), ())
