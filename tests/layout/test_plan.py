"""A plan is right, moves nothing that is there already, moves every byte once, and shares the work."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from layout_strategies import layouts

from resilin.layout import Layout, LayoutError, Region, check, merge, plan, rank
from resilin.layout.memory import apply, gather, scatter

SHAPES = {"w": (6, 5), "b": (7,), "s": (), "t": (3, 2, 4)}


def values() -> dict[str, np.ndarray]:
    g = np.random.default_rng(0)
    return {name: g.standard_normal(shape).astype(np.float32) for name, shape in SHAPES.items()}


def fewest_bytes(source: Layout, target: Layout) -> int:
    """Element by element: whatever a place wants and does not have."""
    have = {(h.tensor, h.place, i) for h in source for i in np.ndindex(SHAPES[h.tensor]) if inside(i, h.region)}
    want = {(h.tensor, h.place, i) for h in target for i in np.ndindex(SHAPES[h.tensor]) if inside(i, h.region)}
    return 4 * len(want - have)


def inside(index: tuple[int, ...], region: Region) -> bool:
    return all(o <= i < e for i, o, e in zip(index, region.offsets, region.ends, strict=True))


@given(st.data(), st.booleans())
def test_a_plan_carried_out_gives_the_target_and_moves_the_fewest_bytes(data, tangled):
    source = data.draw(layouts(SHAPES, tangled=tangled))
    target = data.draw(layouts(SHAPES, places=7))
    found = plan(source, target)
    assert found.moved_bytes == fewest_bytes(source, target)
    assert found.moved_bytes + found.local_bytes == sum(target.bytes_at().values())
    before, wanted = scatter(source, values()), scatter(target, values())
    got = {place: {name: np.full_like(a, np.nan) for name, a in mine.items()} for place, mine in wanted.items()}
    apply(found, before, got)
    for place, mine in wanted.items():
        for name, array in mine.items():
            np.testing.assert_array_equal(got[place][name], array)


@given(st.data(), st.booleans())
def test_each_element_reaches_each_place_once_and_comes_from_who_has_it(data, tangled):
    source = data.draw(layouts(SHAPES, tangled=tangled))
    target = data.draw(layouts(SHAPES, places=7))
    arrived = {(h.place, h.tensor): np.zeros(SHAPES[h.tensor], dtype=int) for h in target}
    for move in plan(source, target):
        arrived[move.target.place, move.tensor][move.region.slices] += 1
        assert any(h.tensor == move.tensor and move.region in h.region for h in source.at(move.source.place))
        assert move.local == (move.source.place == move.target.place)
        assert move.bytes == 4 * move.region.numel
    for h in target:
        arrived[h.place, h.tensor][h.region.slices] -= 1
    assert not any(array.any() for array in arrived.values())


@given(st.data())
def test_there_and_back_is_the_identity(data):
    first, second = data.draw(layouts(SHAPES)), data.draw(layouts(SHAPES, places=7))
    there, back = scatter(second, zeros()), scatter(first, zeros())
    apply(plan(first, second), scatter(first, values()), there)
    apply(plan(second, first), there, back)
    for name, array in gather(first, back).items():
        np.testing.assert_array_equal(array, values()[name])


def zeros() -> dict[str, np.ndarray]:
    return {name: np.zeros(shape, dtype=np.float32) for name, shape in SHAPES.items()}


@given(st.data())
def test_a_layout_needs_nothing_to_become_itself(data):
    layout = data.draw(layouts(SHAPES, tangled=True))
    found = plan(layout, layout)
    assert found.moved_bytes == 0
    assert all(move.local for move in found)


def rows(count: int, places: int, size: int = 1 << 10) -> list[Region]:
    return [
        Region((i * count // places, 0), ((i + 1) * count // places - i * count // places, size)) for i in range(places)
    ]


def test_copies_share_the_sending():
    boxes, shape = rows(96, 4, 1 << 14), {"w": ((96, 1 << 14), "F32")}
    held = [("w", rank(4 * copy + i), box) for copy in range(3) for i, box in enumerate(boxes)]
    source = Layout.of(shape, held, copies=3)
    joining = Layout.of(shape, [("w", rank(12 + i), box) for i, box in enumerate(boxes)])
    sent = plan(source, joining).sent()
    assert sum(sent.values()) == joining.bytes
    assert set(sent.values()) == {joining.bytes // 12}


def test_one_tensor_that_everyone_has_is_sent_in_slabs_by_everyone():
    whole = Region((0, 0), (1000, 1000))
    source = Layout.of({"w": ((1000, 1000), "F32")}, [("w", rank(i), whole) for i in range(7)])
    target = Layout.of({"w": ((1000, 1000), "F32")}, [("w", rank(9), whole)])
    found = plan(source, target)
    sent = [found.sent()[rank(i)] for i in range(7)]
    assert max(sent) - min(sent) <= 4 * 1000
    assert found.moved_bytes == 4_000_000
    small = Layout.of({"w": ((4,), "F32")}, [("w", rank(i), Region((0,), (4,))) for i in range(7)])
    assert len(plan(small, Layout.of({"w": ((4,), "F32")}, [("w", rank(9), Region((0,), (4,)))]))) == 1


def test_many_small_tensors_are_spread_over_their_holders():
    shapes = {f"w{i}": ((100,), "F32") for i in range(40)}
    source = Layout.of(shapes, [(name, rank(r), Region((0,), (100,))) for name in shapes for r in range(4)])
    target = Layout.of(shapes, [(name, rank(9), Region((0,), (100,))) for name in shapes])
    assert set(plan(source, target).sent().values()) == {4000}


def test_survivors_and_snapshots_make_one_source():
    boxes = rows(8, 4)
    shape = {"w": ((8, 1 << 10), "F32")}
    live = Layout.of(shape, [("w", rank(i), box) for i, box in enumerate(boxes)])
    snapshots = Layout.of(shape, [("w", rank((i + 1) % 4), box) for i, box in enumerate(boxes)])
    have = merge(live.without([rank(2)]), snapshots.without([rank(2)]))
    want = Layout.of(shape, [("w", rank(i), box) for i, box in zip((0, 1, 3), rows(8, 3), strict=True)])
    found = plan(have, want)
    assert rank(2) not in {move.source.place for move in found}
    assert found.moved_bytes == fewest_rows(have, want)


def fewest_rows(have: Layout, want: Layout) -> int:
    own = {(h.place, r) for h in have for r in range(h.region.offsets[0], h.region.ends[0])}
    return 4096 * len({(h.place, r) for h in want for r in range(h.region.offsets[0], h.region.ends[0])} - own)


@given(st.data())
def test_gathered_at_one_place_everything_is_there_whole(data):
    source = data.draw(layouts(SHAPES, tangled=True))
    whole = source.gathered(rank(9))
    check(whole)
    got = scatter(whole, {name: np.full(shape, np.nan, np.float32) for name, shape in SHAPES.items()})
    apply(plan(source, whole), scatter(source, values()), got)
    for name, array in gather(whole, got).items():
        np.testing.assert_array_equal(array, values()[name])


def test_what_cannot_be_planned_names_the_tensor_and_the_elements():
    have = Layout.of({"w": ((4, 4), "F32")}, [("w", rank(0), Region((0, 0), (3, 4)))])
    want = Layout.of({"w": ((4, 4), "F32")}, [("w", rank(1), Region((2, 0), (2, 4)))])
    with pytest.raises(
        LayoutError, match=r"tensor 'w' \[4, 4\]: no place of the source layout holds all of \[2:4, 0:4\]"
    ):
        plan(have, want)
    with pytest.raises(LayoutError, match="the source layout has no tensor 'v'"):
        plan(have, Layout.of({"v": ((4,), "F32")}, []))
    with pytest.raises(LayoutError, match=r"F32 \[4, 4\] in the source layout, but the target wants F32 \[4, 5\]"):
        plan(have, Layout.of({"w": ((4, 5), "F32")}, []))
    with pytest.raises(LayoutError, match="the target layout has no tensor 'q'"):
        plan(have, want, ["q"])


def test_a_gap_hidden_by_an_overlap_is_found():
    held = [("w", rank(0), Region((0,), (4,))), ("w", rank(1), Region((2,), (4,)))]
    have = Layout.of({"w": ((8,), "F32")}, held)
    with pytest.raises(LayoutError, match=r"no place of the source layout holds \[6:8\]"):
        plan(have, Layout.of({"w": ((8,), "F32")}, [("w", rank(2), Region((0,), (8,)))]))


def test_buffers_that_are_missing_or_short_are_refused():
    layout = Layout.of({"w": ((4,), "F32")}, [("w", rank(0), Region((0,), (4,)))])
    wanted = Layout.of({"w": ((4,), "F32")}, [("w", rank(1), Region((0,), (4,)))])
    good = {rank(0): {"w": np.zeros(4, np.float32)}}
    with pytest.raises(LayoutError, match="rank 1: has no buffer 'w'"):
        apply(plan(layout, wanted), good, {rank(1): {}})
    with pytest.raises(LayoutError, match="elements 0 to 3 are asked of buffer 'w', which has 3"):
        apply(plan(layout, wanted), good, {rank(1): {"w": np.zeros(3, np.float32)}})
