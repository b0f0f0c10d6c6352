"""Columns of boxes say what regions say one by one."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from layout_strategies import regions, shapes

from resilin.layout import Boxes, Region, flat_range
from resilin.layout.boxes import distinct, flat_ranges, overlaps, slabs
from resilin.layout.holdings import contiguous
from resilin.layout.region import row_major


@given(st.data())
def test_overlaps_are_all_pairs_that_share_elements(data):
    shape = data.draw(shapes)
    first = data.draw(st.lists(regions(shape, empty=False), max_size=12))
    second = data.draw(st.lists(regions(shape, empty=False), max_size=12))
    a, b, shared = overlaps(Boxes.of(first, len(shape)), Boxes.of(second, len(shape)))
    found = {(i, j): box for i, j, box in zip(a.tolist(), b.tolist(), shared, strict=True)}
    expected = {(i, j): one & other for i, one in enumerate(first) for j, other in enumerate(second)}
    assert found == {key: box for key, box in expected.items() if box.numel}
    assert len(found) == len(a)
    assert (np.diff(b) >= 0).all()


@given(st.data())
def test_distinct_boxes_come_once_in_order_and_number_the_rest(data):
    shape = data.draw(shapes)
    few = data.draw(st.lists(regions(shape), min_size=1, max_size=4))
    many = data.draw(st.lists(st.sampled_from(few), max_size=15))
    boxes, number = distinct(Boxes.of(many, len(shape)))
    assert list(boxes) == sorted(set(many))
    assert [boxes.region(n) for n in number.tolist()] == many


@given(st.data())
def test_many_flat_ranges_are_each_the_one(data):
    shape = data.draw(shapes)
    total = int(np.prod(shape))
    ends = data.draw(st.lists(st.tuples(st.integers(0, total), st.integers(0, total)).map(sorted), max_size=8))
    starts, stops = np.array(ends, dtype=np.int64).reshape(-1, 2).T
    which, boxes = flat_ranges(shape, starts, stops)
    expected = [(i, box) for i, (low, high) in enumerate(ends) for box in flat_range(shape, low, high)]
    assert list(zip(which.tolist(), boxes, strict=True)) == expected


@given(st.data())
def test_slabs_tile_each_box_and_are_as_many_as_asked_where_a_dimension_allows_it(data):
    shape = data.draw(shapes)
    whole = data.draw(st.lists(regions(shape, empty=False), min_size=1, max_size=5))
    asked = data.draw(st.lists(st.integers(1, 9), min_size=len(whole), max_size=len(whole)))
    which, pieces = slabs(Boxes.of(whole, len(shape)), np.array(asked))
    for number, region in enumerate(whole):
        mine = list(pieces.take(np.flatnonzero(which == number)))
        assert all(piece in region and piece.numel for piece in mine)
        assert sum(piece.numel for piece in mine) == region.numel
        assert not any((a & b).numel for i, a in enumerate(mine) for b in mine[:i]) or not shape
        assert len(mine) == min(asked[number], max(region.sizes, default=1))


@given(st.data())
def test_strides_of_boxes_that_lie_alone(data):
    shape = data.draw(shapes)
    boxes = data.draw(st.lists(regions(shape, empty=False), min_size=1, max_size=4))
    strides = contiguous(Boxes.of(boxes, len(shape)).sizes)
    assert [tuple(row) for row in strides.tolist()] == [row_major(box.sizes) for box in boxes]


def test_boxes_know_their_ends_and_sizes():
    boxes = Boxes.of([Region((0, 2), (3, 4)), Region((1, 0), (1, 1))], 2)
    assert boxes.ends.tolist() == [[3, 6], [2, 1]]
    assert boxes.numel.tolist() == [12, 1]
