"""Orders for members of stages with unlike replicas: what any slot goes through, and that nobody locks."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from resilin.parallel.pipeline import (
    METHODS,
    Action,
    Costs,
    MemberSchedule,
    Receive,
    ScheduleError,
    Send,
    SlotTable,
    Timeline,
    build,
    check_rendezvous,
    follow,
    in_blocks,
    in_turns,
    level,
    lower_members,
    simulate,
    simulate_members,
    slots_of,
    transfers,
)


@st.composite
def damaged(draw: st.DrawFn, ranks: int, start: SlotTable, how: str) -> list[SlotTable]:
    """One table a rank, each after losses (and, of whole micro-batches, joins) of its own."""
    tables = []
    for _ in range(ranks):
        table = start
        for _ in range(draw(st.integers(0, 3))):
            if len(table.replicas) > 1 and (how == "reshape" or draw(st.booleans())):
                table = table.without(draw(st.sampled_from(table.replicas)), how)  # type: ignore[arg-type]
            elif how == "whole":
                table = table.joined(draw(st.sampled_from([r for r in range(12) if r not in table.replicas])))
        tables.append(table)
    return tables


@st.composite
def scattered(draw: st.DrawFn, ranks: int, slots: int) -> list[SlotTable]:
    """Tables without any likeness: single slots dealt at random."""
    tables = []
    for _ in range(ranks):
        owned: dict[int, list[list[tuple[int, int]]]] = {r: [] for r in range(draw(st.integers(1, 3)))}
        for slot in draw(st.permutations(range(slots))):
            mine = owned[draw(st.integers(0, len(owned) - 1))]
            if mine and draw(st.booleans()):
                mine[-1].append((slot, slot + 1))
            else:
                mine.append([(slot, slot + 1)])
        tables.append(SlotTable.of(slots, owned))
    return tables


def through(schedule: MemberSchedule, timeline: Timeline) -> dict[tuple[str, int, int], tuple[Fraction, Fraction]]:
    """(kind, stage, slot) -> (start, end): slot by slot, and each just once."""
    found = {}
    for record in timeline.records:
        member = schedule.members[record.rank]
        assert schedule.rank_of[record.action.stage] == member.rank
        micro = schedule.tables[member.rank].micros(member.replica)[record.action.micro]
        assert schedule.rows(record.rank, record.action.micro) == len(slots_of(micro))
        for slot in slots_of(micro):
            key = (record.action.kind.value, record.action.stage, slot)
            assert key not in found
            found[key] = record.start, record.end
    return found


def check(schedule: MemberSchedule, transfer: int = 0) -> Timeline:
    timeline = simulate_members(schedule, Costs(1, 1, 1), transfer)
    Timeline.of(timeline.records, timeline.ranks)  # nobody does two things at once
    at = through(schedule, timeline)
    slots, stages = schedule.tables[0].slots, len(schedule.rank_of)
    assert {key[1:] for key in at if key[0] == "F"} == {(s, i) for s in range(stages) for i in range(slots)}
    for (kind, stage, slot), (start, _) in at.items():
        if kind == "F" and stage:
            apart = schedule.rank_of[stage] != schedule.rank_of[stage - 1]
            assert start >= at["F", stage - 1, slot][1] + transfer * apart
        if kind in "BI":
            assert start >= at["F", stage, slot][1]
            if stage < stages - 1:
                apart = schedule.rank_of[stage] != schedule.rank_of[stage + 1]
                assert start >= at.get(("B", stage + 1, slot), at.get(("I", stage + 1, slot)))[1] + transfer * apart
        if kind == "W":
            assert start >= at["I", stage, slot][1]
    return timeline


def check_messages(schedule: MemberSchedule) -> None:
    rows = lower_members(schedule)
    expected = 0
    for here, there in zip(schedule.rank_of, schedule.rank_of[1:], strict=False):
        expected += 2 * len(transfers(schedule.tables[here], schedule.tables[there])) * (here != there)
    assert check_rendezvous(rows) == expected
    first, last = schedule.rank_of[0], schedule.rank_of[-1]
    more = len(transfers(schedule.tables[first], schedule.tables[last])) * (first != last)
    assert check_rendezvous(lower_members(schedule, tied=True)) == expected + more
    for number, row in enumerate(rows):
        assert tuple(op for op in row if isinstance(op, Action)) == schedule.actions[number]
        for op in row:
            if isinstance(op, Send | Receive):
                ours, theirs = schedule.members[number], schedule.members[op.peer]
                sender, receiver = (ours, theirs) if isinstance(op, Send) else (theirs, ours)
                part = op.message
                assert (part.rows.sender, part.rows.receiver) == (sender.replica, receiver.replica)
                assert schedule.rank_of[part.source] == sender.rank
                assert schedule.rank_of[part.target] == receiver.rank


@given(st.integers(1, 5), st.integers(1, 4), st.integers(1, 4), st.integers(1, 3), st.data())
@settings(max_examples=60, deadline=None)
def test_any_losses_and_joins_leave_an_order_that_runs(
    ranks: int, replicas: int, each: int, micro: int, data: st.DataObject
) -> None:
    start = in_blocks(replicas * each * micro, replicas, micro)
    tables = data.draw(damaged(ranks, start, "whole"))
    schedule = level(tables, more=data.draw(st.integers(0, 2)))
    check(schedule, transfer=data.draw(st.integers(0, 2)))
    check_messages(schedule)


@given(st.integers(1, 4).flatmap(lambda ranks: st.integers(1, 10).flatmap(lambda slots: scattered(ranks, slots))))
@settings(max_examples=60, deadline=None)
def test_tables_without_any_likeness_have_an_order_too(tables: list[SlotTable]) -> None:
    schedule = level(tables)
    check(schedule)
    check_messages(schedule)


@given(st.sampled_from(sorted(METHODS)), st.integers(1, 4), st.integers(1, 4), st.integers(1, 6), st.data())
@settings(max_examples=60, deadline=None)
def test_replicas_in_step_follow_any_schedule(
    name: str, ranks: int, replicas: int, micros: int, data: st.DataObject
) -> None:
    stages = ranks * (METHODS[name].chunks or (2 if METHODS[name].grouped else 1))
    tables = data.draw(damaged(ranks, in_turns(replicas * micros * 2, replicas, micros), "reshape"))
    schedule = follow(build(name, stages, ranks, micros), tables)
    check(schedule, transfer=data.draw(st.integers(0, 2)))
    check_messages(schedule)


@given(st.integers(1, 6), st.integers(1, 4), st.integers(1, 8))
@settings(max_examples=40, deadline=None)
def test_equal_replicas_do_1f1b(ranks: int, replicas: int, each: int) -> None:
    plain = build("1f1b", ranks, ranks, each)
    for table in (in_blocks(replicas * each, replicas, 1), in_turns(replicas * each, replicas, each)):
        schedule = level([table] * ranks)
        assert schedule == follow(plain, [table] * ranks)
        assert simulate_members(schedule).makespan == simulate(plain).makespan


def took(tables: list[SlotTable], more: int = 0) -> Fraction:
    return simulate_members(level(tables, more=more), Costs(1, 1, 1)).makespan


def test_a_loss_costs_least_reshaped_and_whole_it_costs_no_more_than_dropping_the_row() -> None:
    """Four ranks of four replicas, sixteen micro-batches of three slots; one replica of one rank is lost."""
    start = in_blocks(48, 4, 3)
    undisturbed, dropped = took([start] * 4), took([start.without(1)] * 4)
    for rank in range(4):
        for replica in range(4):
            one = {
                how: [start.without(replica, how) if at == rank else start for at in range(4)]  # type: ignore[arg-type]
                for how in ("whole", "reshape")
            }
            assert undisturbed < took(one["reshape"]) < dropped
            assert took(one["whole"], more=2) <= dropped


def test_a_limit_that_would_lock_is_passed() -> None:
    """The last rank's one micro-batch needs all three of the first, whose limit is two in flight."""
    fine, coarse = in_blocks(3, 1, 1), in_blocks(3, 1, 3)
    schedule = level([fine, coarse])
    check(schedule)
    assert [str(action) for action in schedule.actions[0]] == ["0F0", "0F1", "0F2", "0B0", "0B1", "0B2"]
    assert level([fine, fine]).actions[0] == build("1f1b", 2, 2, 3).actions[0]


def test_tables_that_do_not_fit_are_said() -> None:
    plain = build("1f1b", 2, 2, 2)
    table = in_turns(8, 2, 2)
    with pytest.raises(ScheduleError, match="1 slot tables are given for 2 ranks"):
        follow(plain, [table])
    with pytest.raises(ScheduleError, match=r"rank 1, replica 1 has 3 micro-batches, the schedule 2: .*`level`"):
        follow(plain, [table, SlotTable.of(8, {1: [[(0, 2)], [(2, 4)], [(4, 8)]]})])
    with pytest.raises(ScheduleError, match="slot 1 is in micro-batch 0 at rank 0, but in 1 at rank 1"):
        follow(plain, [table, in_blocks(8, 4, 1)])
    with pytest.raises(ScheduleError, match=r"tables of different batches: \[8, 4\] slots"):
        level([table, in_turns(4, 2, 2)])
    with pytest.raises(ScheduleError, match="cannot hold -1 micro-batches more"):
        level([table], more=-1)
    with pytest.raises(ScheduleError, match=r"leave costs\.micro out"):
        level([table], Costs(micro=[1]))


def test_an_order_that_locks_is_told_by_member() -> None:
    good = level([in_turns(2, 1, 2)] * 2)
    rows = [list(row) for row in good.actions]
    rows[0].reverse()
    with pytest.raises(ScheduleError, match="rank 0, replica 0 at 0B1; rank 1, replica 0 at 1F0"):
        simulate_members(MemberSchedule(good.tables, good.rank_of, good.members, tuple(map(tuple, rows))))
