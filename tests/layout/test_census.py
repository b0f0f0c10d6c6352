"""Every element is somewhere, and none more often than declared."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from layout_strategies import layouts

from resilin.layout import Layout, LayoutError, Region, check, count, gaps, rank

SHAPES = {"w": (5, 4), "b": (6,), "s": ()}


def counts(layout: Layout, name: str) -> np.ndarray:
    held = np.zeros(layout.tensors[name].shape, dtype=int)
    for holding in layout:
        if holding.tensor == name:
            held[holding.region.slices] += 1
    return held


@given(st.data(), st.booleans())
def test_counts_are_those_of_the_elements(data, tangled):
    layout = data.draw(layouts(SHAPES, tangled=tangled))
    for name, held in layout.tensors.items():
        found, expected = count(held), counts(layout, name)
        assert (found.least, found.most) == (expected.min(), expected.max())
        assert not gaps(held)
    check(layout)


@given(st.data())
def test_what_is_lost_with_a_place_is_named(data):
    layout = data.draw(layouts(SHAPES))
    lost = data.draw(st.sampled_from(layout.places))
    left = layout.without([lost])
    nowhere = {name: int((counts(left, name) == 0).sum()) for name in SHAPES}
    assert {name: sum(box.numel for box in gaps(held)) for name, held in left.tensors.items()} == nowhere
    first = next((name for name in SHAPES if nowhere[name]), None)
    if first is None:
        check(left)
    else:
        with pytest.raises(LayoutError, match=f"tensor '{first}' .*: no place holds "):
            check(left)


def test_a_dropped_or_doubled_fragment_of_declared_copies_is_refused():
    rows = [Region((row, 0), (1, 4)) for row in range(4)]
    held = [("w", rank(row), box) for row, box in enumerate(rows)]
    check(Layout.of({"w": ((4, 4), "F32")}, held, copies=1))
    with pytest.raises(LayoutError, match=r"no place holds \[2:3, 0:4\]"):
        check(Layout.of({"w": ((4, 4), "F32")}, held[:2] + held[3:], copies=1))
    with pytest.raises(LayoutError, match="declared to be held 1 times, but elements are held 1 to 2 times"):
        check(Layout.of({"w": ((4, 4), "F32")}, [*held, ("w", rank(0), rows[3])], copies=1))
    with pytest.raises(LayoutError, match="held 1 to 2 times"):
        check(Layout.of({"w": ((4, 4), "F32")}, [*held, ("w", rank(0), Region((1, 1), (2, 2)))], copies=1))


def test_a_tensor_without_elements_is_complete():
    layout = Layout.of({"w": ((0, 4), "F32")}, [], copies=1)
    check(layout)
    assert (count(layout.tensors["w"]).least, gaps(layout.tensors["w"])) == (1, ())


def test_misplaced_regions_are_refused_by_name():
    with pytest.raises(LayoutError, match=r"tensor 'w': region \[0:5\] reaches outside a tensor of shape \[4\]"):
        Layout.of({"w": ((4,), "F32")}, [("w", rank(0), Region((0,), (5,)))])
    with pytest.raises(LayoutError, match="'v', which is none of the tensors"):
        Layout.of({"w": ((4,), "F32")}, [("v", rank(0), Region((0,), (4,)))])
    with pytest.raises(LayoutError, match="dtype 'F31' is unknown"):
        Layout.of({"w": ((4,), "F31")}, [])
    with pytest.raises(LayoutError, match="has no rank 7"):
        Layout.of({"w": ((4,), "F32")}, [("w", rank(0), Region((0,), (4,)))]).row(rank(7))
