"""Broken schedules are refused by the name of what is wrong."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from pipeline_strategies import schedules, stuck

from resilin.parallel.pipeline import Action, Kind, Schedule, ScheduleError, build, validate


def with_row(schedule: Schedule, rank: int, row: list[Action]) -> Schedule:
    actions = list(schedule.actions)
    actions[rank] = tuple(row)
    return replace(schedule, actions=tuple(actions))


@given(schedules(most_ranks=4, most_micros=5), st.data())
@settings(max_examples=100, deadline=None)
def test_a_lost_or_doubled_action_is_named(schedule: Schedule, data: st.DataObject) -> None:
    rank = data.draw(st.integers(0, schedule.ranks - 1))
    row = list(schedule.actions[rank])
    at = data.draw(st.integers(0, len(row) - 1))
    with pytest.raises(ScheduleError, match=rf"^rank {rank}: {row[at]} .*is missing$"):
        validate(with_row(schedule, rank, row[:at] + row[at + 1 :]))
    with pytest.raises(ScheduleError, match=f"^rank {rank}: {row[at]} is there twice$"):
        validate(with_row(schedule, rank, [*row, row[at]]))


@given(schedules(most_ranks=4, most_micros=4), st.data())
@settings(max_examples=200, deadline=None)
def test_any_other_order_passes_exactly_when_it_can_run(schedule: Schedule, data: st.DataObject) -> None:
    rank = data.draw(st.integers(0, schedule.ranks - 1))
    row = list(schedule.actions[rank])
    for _ in range(data.draw(st.integers(1, 4))):
        a, b = data.draw(st.integers(0, len(row) - 1)), data.draw(st.integers(0, len(row) - 1))
        row[a], row[b] = row[b], row[a]
    changed = with_row(schedule, rank, row)
    if stuck(changed):
        with pytest.raises(ScheduleError, match=r"comes before|deadlocks"):
            validate(changed)
    else:
        validate(changed)


@given(schedules(most_ranks=4, most_micros=6), st.integers(0, 20))
@settings(max_examples=80, deadline=None)
def test_a_limit_of_memory_holds(schedule: Schedule, limit: int) -> None:
    held, peak = 0, 0
    for row in schedule.actions:
        for number in range(len(row) + 1):
            done = [action.kind for action in row[:number]]
            held = done.count(Kind.F) - done.count(Kind.B) - done.count(Kind.W)
            peak = max(peak, held)
    if peak > limit:
        with pytest.raises(ScheduleError, match=rf"the limit is {limit}, and this schedule needs {peak}"):
            validate(schedule, limit)
    else:
        validate(schedule, limit)


@given(schedules(most_ranks=4, most_micros=4), st.data())
@settings(max_examples=50, deadline=None)
def test_an_action_on_another_rank_is_named(schedule: Schedule, data: st.DataObject) -> None:
    assume(schedule.ranks > 1)
    rank = data.draw(st.integers(0, schedule.ranks - 1))
    *row, last = schedule.actions[rank]
    other = (rank + 1) % schedule.ranks
    moved = with_row(with_row(schedule, rank, row), other, [*schedule.actions[other], last])
    with pytest.raises(
        ScheduleError, match=f"rank {other}: {last} belongs to rank {rank}, which holds stage {last.stage}"
    ):
        validate(moved)


def test_a_deadlock_is_told_rank_by_rank() -> None:
    text = "0F0,0F1,0B1,0B0\n1F0,1B0,1F1,1B1"
    validate(Schedule.parse(text))
    with pytest.raises(
        ScheduleError, match=r"rank 0 waits at 0B0 for 1B0 of rank 1; rank 1 waits at 1F1 for 0F1 of rank 0"
    ):
        validate(Schedule.parse("0F0,0B0,0F1,0B1\n1F1,1B1,1F0,1B0"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0F0,0B0,0I0,0W0", "rank 0: 0B0 and 0I0 are both there: a backward is whole"),
        ("0F0,0I0", "rank 0: 0W0 is missing"),
        ("0F0,0W0", "rank 0: 0I0 is missing"),
        ("0F0", r"rank 0: 0B0 \(or both of its halves, I and W\) is missing"),
        ("0B0,0F0", "rank 0: 0B0 comes before 0F0, whose results it needs"),
        ("0F0,0W0,0I0", "rank 0: 0W0 comes before 0I0, whose results it needs"),
    ],
)
def test_halves_and_wholes(text: str, message: str) -> None:
    with pytest.raises(ScheduleError, match=message):
        validate(Schedule.parse(text))


def test_halves_and_wholes_may_be_mixed_between_stages() -> None:
    validate(Schedule.parse("0F0,0B0\n1F0,1I0,1W0\n2F0,2B0"))


def test_stages_and_numbers_outside_are_named() -> None:
    schedule = build("1f1b", 2, 2, 2)
    with pytest.raises(ScheduleError, match="stage 1 is on rank 5, but there are only ranks 0 to 1"):
        validate(replace(schedule, rank_of=(0, 5)))
    with pytest.raises(ScheduleError, match="rank 0: 0F1 is outside the 2 stages and 1 micro-batches"):
        validate(replace(schedule, micros=1))
    with pytest.raises(ScheduleError, match="at least one rank"):
        validate(Schedule((), (), 0))
