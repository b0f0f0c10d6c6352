"""How members and blocks are divided over stages, when that is worth a change, and the orders that follow."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from resilin.cluster.changes import changed, first_view
from resilin.cluster.division import Division
from resilin.cluster.protocol.messages import Adopt
from resilin.cluster.view import View
from resilin.parallel.pipeline.errors import ScheduleError
from resilin.parallel.pipeline.member_orders import MemberOrders, orders_of
from resilin.parallel.pipeline.messages import check_rendezvous
from resilin.parallel.pipeline.schedule import Action, F
from resilin.parallel.pipeline.simulate import Costs
from resilin.run.elastic_dealing import Dealing

EQUAL = Division((1.0,) * 8 + (0.0,), micros=12)


def view_of(sizes: list[int], division: Division = EQUAL) -> View:
    """Stages of so many members, their blocks divided for them."""
    members = list(range(sum(sizes)))
    view = first_view(members, dict.fromkeys(members, "here"), len(sizes))
    stages, first = [], 0
    for size in sizes:
        part = first_view(members[first : first + size], dict.fromkeys(members[first : first + size], "here"))
        stages.append(part.stages[0])
        first += size
    return View(0, tuple(stages), view.hosts, division.layers(sizes))


def test_blocks_follow_the_members_and_the_head_counts():
    assert EQUAL.layers([2, 2]) == (0, 4, 8)
    assert EQUAL.layers([3, 1]) == (0, 6, 8)
    assert Division((1.0,) * 8 + (4.0,)).layers([1, 1]) == (0, 6, 8)
    assert Division((1.0,) * 8 + (0.0,), fixed=(1, 7)).layers([1, 1]) == (0, 1, 8)
    assert Division(()).layers([5]) == ()
    with pytest.raises(ScheduleError):
        Division((1.0, 1.0, 0.0)).layers([1, 1, 1])


def test_blocks_take_what_their_stages_have_taken():
    known = EQUAL.after((0, 4, 8), (4.0, 12.0))
    assert (EQUAL.basis, known.basis) == ("by FLOPs", "measured")
    assert known.measured == (1.0,) * 4 + (3.0,) * 4 + (0.0,)
    assert known.layers([1, 1]) == (0, 5, 8)
    again = known.after((0, 5, 8), (7.0, 9.0))  # as was to be expected: nothing is learned
    assert again.measured == known.measured
    other = Division((1.0,) * 2 + (2.0,)).after((0, 1, 2), (1.0, 9.0))  # the last stage's head is its own too
    assert other.measured == (1.0, 3.0, 6.0)


def test_times_that_scatter_do_not_move_blocks():
    view = view_of([2, 2])
    assert EQUAL.after((0, 4, 8), (4.0, 4.15)).better(view) is None
    slow = EQUAL.after((0, 4, 8), (4.0, 8.0)).better(view)
    assert slow is not None
    assert slow.view.layers[1] > 4


@given(st.lists(st.floats(0.1, 9), min_size=4, max_size=9), st.data())
def test_what_is_measured_adds_up_to_what_stages_have_taken(costs: list[float], data: st.DataObject):
    stages = data.draw(st.integers(1, len(costs) - 1))
    cuts = data.draw(st.sets(st.integers(1, len(costs) - 2), min_size=stages - 1, max_size=stages - 1))
    bounds = (0, *sorted(cuts), len(costs) - 1)
    seconds = data.draw(st.lists(st.floats(1e-4, 10), min_size=stages, max_size=stages))
    found = Division(tuple(costs)).after(bounds, seconds).measured
    sums = [sum(found[a:b]) for a, b in pairwise(bounds)]
    sums[-1] += found[-1]
    assert sums == pytest.approx(seconds)


def test_a_loss_moves_nothing_and_then_blocks_follow():
    view = changed(view_of([2, 2]), gone=[3])
    assert [len(stage.members) for stage in view.stages] == [2, 1]
    assert view.layers == (0, 4, 8)
    better = EQUAL.better(view)
    assert better is not None
    assert better.view.layers == EQUAL.layers([2, 1])
    assert better.view.stages == view.stages
    assert [reason["axis"] for reason in better.reasons] == ["random", "dataflow", "graph", "frequency"]
    graph = better.reasons[2]
    assert graph["decision"] == "move"
    assert graph["seconds"]["after"] < graph["seconds"]["before"] <= 1.001


def test_members_move_where_stages_are_unlike_by_more_than_one():
    view = view_of([4, 1])
    better = EQUAL.better(View(3, view.stages, view.hosts, (0, 4, 8)))
    assert better is not None
    assert sorted(len(stage.members) for stage in better.view.stages) == [2, 3]
    assert better.view.epoch == 3


@pytest.mark.parametrize("division", [EQUAL, Division((1.0,) * 8 + (0.0,), fixed=(4, 4), micros=12)])
def test_what_gains_little_stays(division: Division):
    assert division.better(view_of([2, 2], division)) is None
    assert division.better(first_view([0, 1], dict.fromkeys(range(2), "here"))) is None
    # More members than micro-batches: nothing is planned, rather than something wrong.
    assert Division(division.costs, micros=1).better(view_of([2, 2], division)) is None


@given(st.lists(st.integers(1, 4), min_size=1, max_size=4), st.integers(1, 9), st.data())
def test_orders_of_any_members_meet(sizes: list[int], micros: int, data: st.DataObject):
    view = view_of(sizes)
    missing = data.draw(st.sets(st.integers(0, micros - 1)))
    kept = {stage.members[0]: tuple(sorted(missing)) for stage in view.stages if missing}
    dealing = Dealing(Adopt(view, view, 5, {}, kept))
    owned = dealing.of_step(5, micros)
    todo = dealing.todo(5)
    assert [sorted(m for mine in stage for m in mine) for stage in todo] == [sorted({*range(micros)} - missing)] * len(
        sizes
    )
    for mine, left in zip(owned, (one for stage in todo for one in stage), strict=True):
        assert set(left) <= set(mine)
    costs = Costs(forward=[1.0] * len(sizes), input=[1.0] * len(sizes), weight=[1.0] * len(sizes))
    rows = orders_of(todo, costs)
    hops = len(sizes) - 1
    assert check_rendezvous(rows) == 2 * hops * (micros - len(missing))
    for row, mine in zip(rows, (one for stage in todo for one in stage), strict=True):
        assert sorted(op.micro for op in row if isinstance(op, Action) and op.kind is F) == list(range(len(mine)))
    evaluating = [
        MemberOrders(sizes, rank, dealing.todo, dealing.evaluated, costs).evaluating(0, micros)
        for rank in range(sum(sizes))
    ]
    assert check_rendezvous(evaluating) == hops * micros


@given(st.lists(st.integers(1, 4), min_size=2, max_size=4), st.lists(st.floats(0.1, 9), min_size=5, max_size=9))
def test_a_better_division_has_everybody_and_every_block(sizes: list[int], costs: list[float]):
    division = Division(tuple(costs), micros=12)
    view = view_of(sizes, division)
    even = tuple(len(costs[:-1]) * stage // len(sizes) for stage in range(len(sizes) + 1))
    better = division.better(View(0, view.stages, view.hosts, even))
    if better is not None:
        assert sorted(better.view.members) == sorted(view.members)
        assert (better.view.layers[0], better.view.layers[-1]) == (0, len(costs) - 1)
        assert all(b > a for a, b in pairwise(better.view.layers))


def test_why_work_is_dealt_so_after_a_loss_is_told_with_what_a_step_takes():
    before = first_view(range(4), dict.fromkeys(range(4), "here"))
    after = changed(before, [1])
    division = Division((), (), 8)
    random, dataflow = division.dataflow(before, after, 32, 4, whole=True)
    assert (random["axis"], dataflow["decision"]) == ("random", "runs")
    assert dataflow["seconds"] == {"before": 1.0, "after": 1.5}, "three micro-batches, where there were two"
    (even,) = division.dataflow(before, after, 32, 4, whole=False)
    assert (even["decision"], even["seconds"]) == ("even", {"before": 1.0, "after": 11 / 8})
    assert even["why"] == "3 members compute 10 to 11 of 32 slots, in 3 micro-batches each: equal to rounding"
    two = replace(first_view(range(4), dict.fromkeys(range(4), "here"), 2), layers=(0, 2, 4))
    staged = replace(division, costs=(1.0, 1.0, 1.0, 1.0, 0.5))
    _, dataflow = staged.dataflow(two, changed(two, [3]), 32, 4, whole=True)
    assert dataflow["seconds"]["after"] > 1.2
    # Nothing is told of a step that cannot be taken: more members than micro-batches.
    assert not replace(division, micros=2).dataflow(before, after, 2, 1, whole=True)
