"""Simulated times: the papers' formulas to the last unit, and any schedule against a longest path."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pipeline_strategies import inputs, schedules

from resilin.parallel.pipeline import (
    Action,
    Costs,
    Kind,
    Record,
    Schedule,
    ScheduleError,
    Timeline,
    build,
    simulate,
)

ranks_ = st.integers(1, 8)
chunks_ = st.integers(1, 4)
micros_ = st.integers(1, 30)
times = st.integers(1, 9) | st.fractions(min_value=Fraction(1, 7), max_value=9, max_denominator=7)


@given(ranks_, micros_, times, times)
@settings(max_examples=150, deadline=None)
def test_gpipe_and_1f1b_have_bubble_p_minus_1_over_m(
    ranks: int, micros: int, forward: Fraction, back: Fraction
) -> None:
    for name in ("gpipe", "1f1b"):
        timeline = simulate(build(name, ranks, ranks, micros), Costs(forward, backward=back))
        assert timeline.makespan == (micros + ranks - 1) * (forward + back)
        assert timeline.bubble == Fraction(ranks - 1, micros)
        assert timeline.busy() == (micros * (forward + back),) * ranks
        assert timeline.idle() == ((ranks - 1) * (forward + back),) * ranks


@given(ranks_, chunks_, micros_, times, times, st.integers(0, 9))
@settings(max_examples=150, deadline=None)
def test_interleaving_divides_the_bubble_by_the_stages_of_a_rank(
    ranks: int, chunks: int, micros: int, forward: Fraction, back: Fraction, more: int
) -> None:
    """Also where micro-batches do not divide by ranks, and for larger groups."""
    if micros < ranks:
        micros += ranks
    schedule = build("interleaved", chunks * ranks, ranks, micros, ranks + more)
    timeline = simulate(schedule, Costs(forward, backward=back))
    assert timeline.bubble == Fraction(ranks - 1, chunks * micros)
    whole = chunks * (forward + back)  # what one rank does for a micro-batch
    assert timeline.makespan == (micros + Fraction(ranks - 1, chunks)) * whole
    breadth_first = simulate(build("gpipe", chunks * ranks, ranks, micros), Costs(forward, backward=back))
    assert breadth_first.makespan == timeline.makespan


@given(ranks_, micros_, times, times, times)
@settings(max_examples=200, deadline=None)
def test_zb_h1_has_the_papers_bubble_exactly_where_it_must(
    ranks: int, micros: int, forward: Fraction, into: Fraction, weight: Fraction
) -> None:
    timeline = simulate(build("zb-h1", ranks, ranks, micros), Costs(forward, into, weight))
    bubble = timeline.makespan - micros * (forward + into + weight)
    published = bubble == (ranks - 1) * (forward + into - weight)
    if ranks > 1:
        assert published == (micros >= ranks and weight <= forward and weight <= into)
    else:
        assert bubble == 0


@given(ranks_, chunks_, micros_, times, times, st.fractions(min_value=Fraction(1, 4), max_value=1, max_denominator=4))
@settings(max_examples=150, deadline=None)
def test_interleaved_halves_have_zb_h1s_bubble_of_one_stage(
    ranks: int, chunks: int, micros: int, forward: Fraction, into: Fraction, part: Fraction
) -> None:
    if micros < ranks:
        micros += ranks
    weight = part * min(forward, into)
    timeline = simulate(build("zb-interleaved", chunks * ranks, ranks, micros), Costs(forward, into, weight))
    ideal = micros * chunks * (forward + into + weight)
    assert timeline.makespan - ideal == (ranks - 1) * (forward + into - weight)


@given(ranks_, micros_)
@settings(max_examples=100, deadline=None)
def test_zb_v_never_pauses_once_it_has_begun(ranks: int, micros: int) -> None:
    micros += 2 * ranks - 2
    timeline = simulate(build("zb-v", 2 * ranks, ranks, micros), Costs(1, 1, 1))
    assert timeline.gaps() == (0,) * ranks
    assert timeline.makespan == 6 * micros + ranks - 1


def test_halves_never_take_longer_than_wholes() -> None:
    for ranks in range(1, 7):
        for micros in range(1, 15):
            whole = simulate(build("1f1b", ranks, ranks, micros), Costs(2, 2, 2)).makespan
            assert simulate(build("zb-h1", ranks, ranks, micros), Costs(2, 2, 2)).makespan <= whole


def longest_path(schedule: Schedule, cost: dict[Action, Fraction], hop: list[int]) -> dict[Action, Fraction]:
    """The end of every action by repeated relaxation: slow, and without any order of its own."""
    end = dict.fromkeys(cost, Fraction(0))
    needed = inputs(schedule)
    changed = True
    while changed:
        changed = False
        for row in schedule.actions:
            before = Fraction(0)
            for action in row:
                start = before
                for other in needed[action]:
                    apart = schedule.rank_of[other.stage] != schedule.rank_of[action.stage]
                    start = max(start, end[other] + (hop[min(other.stage, action.stage)] if apart else 0))
                if start + cost[action] != end[action]:
                    end[action] = start + cost[action]
                    changed = True
                before = end[action]
    return end


@given(schedules(most_ranks=4, most_micros=5), st.data())
@settings(max_examples=60, deadline=None)
def test_any_costs_give_the_longest_path(schedule: Schedule, data: st.DataObject) -> None:
    number = st.integers(0, 6)
    cost = {action: Fraction(data.draw(number)) for row in schedule.actions for action in row}
    hop = [data.draw(number) for _ in range(schedule.stages - 1)]
    timeline = simulate(schedule, cost.__getitem__, hop)
    end = longest_path(schedule, cost, hop)
    assert {record.action: record.end for record in timeline.records} == end
    assert all(record.end - record.start == cost[record.action] for record in timeline.records)
    assert Timeline.of(timeline.records, schedule.ranks).makespan == timeline.makespan


def test_unequal_stages_and_micro_batches() -> None:
    costs = Costs(forward=[1, 2], input=[1, 3], weight=[2, 1], micro=[1, Fraction(1, 2)])
    timeline = simulate(build("gpipe", 2, 2, 2), costs, transfer=5)
    found = {str(record.action): (record.start, record.end) for record in timeline.records}
    assert found == {
        "0F0": (0, 1),
        "0F1": (1, Fraction(3, 2)),
        "1F0": (6, 8),
        "1F1": (8, 9),
        "1B0": (9, 13),
        "1B1": (13, 15),
        "0B0": (18, 21),
        "0B1": (21, Fraction(45, 2)),
    }
    assert timeline.busy() == (6, 9)
    assert timeline.gaps() == (Fraction(33, 2), 0)


def test_floats_stay_floats() -> None:
    timeline = simulate(build("1f1b", 4, 4, 8), Costs(0.1, backward=0.2))
    assert timeline.bubble == pytest.approx(3 / 8)


def test_costs_that_do_not_fit_are_named() -> None:
    schedule = build("1f1b", 4, 4, 8)
    with pytest.raises(ScheduleError, match="forward costs are 3 times; 4 are needed"):
        simulate(schedule, Costs(forward=[1, 2, 3]))
    with pytest.raises(ScheduleError, match="transfer costs are 4 times; 3 are needed"):
        simulate(schedule, transfer=[1, 2, 3, 4])
    with pytest.raises(ScheduleError, match="costs name 2 micro-batches; the schedule has 8"):
        simulate(schedule, Costs(micro=[1, 2]))


def test_measured_records_make_the_same_timeline_in_any_order() -> None:
    simulated = simulate(build("zb-h1", 3, 3, 4), Costs(2, 3, 1))
    again = Timeline.of(reversed(simulated.records))
    assert (again.ranks, again.makespan, again.busy(), again.gaps(), again.bubble) == (
        simulated.ranks,
        simulated.makespan,
        simulated.busy(),
        simulated.gaps(),
        simulated.bubble,
    )


def test_records_that_cannot_be_are_named() -> None:
    one, two = Action(Kind.F, 0, 0), Action(Kind.F, 0, 1)
    with pytest.raises(ScheduleError, match="rank 1: 0F1 starts at 2, while 0F0 runs until 3"):
        Timeline.of([Record(one, 1, 0, 3), Record(two, 1, 2, 4)])
    with pytest.raises(ScheduleError, match="rank 0: 0F0 ends at 1, before 2"):
        Timeline.of([Record(one, 0, 2, 1)])
    with pytest.raises(ScheduleError, match="needs records"):
        Timeline.of([])
