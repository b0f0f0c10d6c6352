"""The orders themselves: complete, free of deadlock, readable, and what their papers say of memory."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pipeline_strategies import schedules, stuck
from torch.distributed.pipelining import schedules as torch_schedules

from resilin.parallel.pipeline import (
    METHODS,
    Action,
    Kind,
    Schedule,
    ScheduleError,
    build,
    check_rendezvous,
    loop,
    lower,
    peak_in_flight,
    validate,
    vee,
)
from resilin.parallel.pipeline.generate import group_sizes


@given(schedules())
@settings(max_examples=300, deadline=None)
def test_every_schedule_is_whole_and_runs_to_its_end(schedule: Schedule) -> None:
    validate(schedule)
    assert not stuck(schedule)


@given(schedules())
@settings(max_examples=60, deadline=None)
def test_torch_accepts_the_text_and_the_order(schedule: Schedule) -> None:
    read = {
        rank: [torch_schedules._Action.from_str(cell) for cell in line.split(",")]
        for rank, line in enumerate(schedule.text().splitlines())
    }
    stage_to_rank = dict(enumerate(schedule.rank_of))
    with_messages = torch_schedules._add_send_recv(read, stage_to_rank.__getitem__, schedule.stages)
    simulated = torch_schedules._simulate_comms_compute(with_messages, stage_to_rank.__getitem__, schedule.stages)
    for rank, row in enumerate(schedule.actions):
        ran = [str(one) for one in simulated[rank] if one is not None and one.is_compute_op]
        assert ran == [str(action) for action in row]


def torch_rows(method: type, ranks: int, chunks: int, micros: int) -> list[list[str]]:
    """What torch's class orders for each rank, made without stages or processes."""
    made = object.__new__(method)
    made.pp_group_size, made.n_local_stages, made._n_microbatches = ranks, chunks, micros
    made._num_stages = made.num_stages = ranks * chunks
    made.number_of_rounds = max(1, micros // ranks)
    made.microbatches_per_round = micros // made.number_of_rounds
    rows = [made._calculate_single_rank_operations(rank) for rank in range(ranks)]
    return [[str(one) for one in row if one is not None] for row in rows]


@given(st.integers(1, 8), st.integers(2, 4), st.integers(1, 30))
@settings(max_examples=80, deadline=None)
def test_orders_are_torchs_where_torch_has_one(ranks: int, chunks: int, micros: int) -> None:
    vee = build("zb-v", 2 * ranks, ranks, micros)
    assert [[str(a) for a in row] for row in vee.actions] == torch_rows(
        torch_schedules.ScheduleZBVZeroBubble, ranks, 2, micros
    )
    if micros >= ranks and micros % (micros // ranks) == 0:
        dealt = build("interleaved", chunks * ranks, ranks, micros)
        assert [[str(a) for a in row] for row in dealt.actions] == torch_rows(
            torch_schedules.ScheduleInterleaved1F1B, ranks, chunks, micros
        )


@given(schedules())
@settings(max_examples=60, deadline=None)
def test_text_is_read_back(schedule: Schedule) -> None:
    again = Schedule.parse(schedule.text(), schedule.name)
    assert again == schedule
    with_bubbles = schedule.text().replace(",", ",, ,")
    assert Schedule.parse(with_bubbles, schedule.name) == schedule


def test_known_orders() -> None:
    assert build("gpipe", 2, 2, 2).text() == "0F0,0F1,0B0,0B1\n1F0,1F1,1B0,1B1\n"
    assert build("gpipe", 4, 2, 1).text() == "0F0,2F0,2B0,0B0\n1F0,3F0,3B0,1B0\n"
    assert build("1f1b", 3, 3, 4).text() == (
        "0F0,0F1,0F2,0B0,0F3,0B1,0B2,0B3\n1F0,1F1,1B0,1F2,1B1,1F3,1B2,1B3\n2F0,2B0,2F1,2B1,2F2,2B2,2F3,2B3\n"
    )
    assert build("interleaved", 4, 2, 2).text() == (
        "0F0,0F1,2F0,2F1,2B0,2B1,0B0,0B1\n1F0,1F1,3F0,3B0,3F1,3B1,1B0,1B1\n"
    )
    assert build("zb-h1", 2, 2, 3).text() == (
        "0F0,0F1,0I0,0W0,0F2,0I1,0W1,0I2,0W2\n1F0,1I0,1F1,1I1,1W0,1F2,1I2,1W1,1W2\n"
    )
    assert build("zb-v", 4, 2, 3).text() == (
        "0F0,0F1,0F2,3F0,3I0,3W0,3F1,3I1,3W1,0I0,0W0,3F2,3I2,3W2,0I1,0W1,0I2,0W2\n"
        "1F0,2F0,1F1,2F1,2I0,2W0,1F2,1I0,1W0,2F2,2I1,2W1,1I1,2I2,1I2,1W1,2W2,1W2\n"
    )


@given(st.integers(1, 8), st.integers(1, 40))
@settings(max_examples=100, deadline=None)
def test_one_stage_a_rank_makes_interleaved_1f1b(ranks: int, micros: int) -> None:
    assert build("interleaved", ranks, ranks, micros).actions == build("1f1b", ranks, ranks, micros).actions
    assert build("zb-interleaved", ranks, ranks, micros).actions == build("zb-h1", ranks, ranks, micros).actions


@given(st.integers(1, 8), st.integers(1, 4), st.integers(1, 30))
@settings(max_examples=100, deadline=None)
def test_activations_held_are_those_of_the_papers(ranks: int, chunks: int, micros: int) -> None:
    one = [min(micros, ranks - rank) for rank in range(ranks)]
    assert list(peak_in_flight(build("1f1b", ranks, ranks, micros))) == one
    assert set(peak_in_flight(build("zb-h1", ranks, ranks, micros))) == {min(micros, ranks)}
    assert set(peak_in_flight(build("gpipe", ranks * chunks, ranks, micros))) == {micros * chunks}
    vee = peak_in_flight(build("zb-v", 2 * ranks, ranks, micros))
    assert max(vee) == 2 * min(micros, ranks)
    one_by_one = peak_in_flight(build("interleaved", ranks * chunks, ranks, micros))
    assert max(peak_in_flight(build("zb-interleaved", ranks * chunks, ranks, micros))) == max(one_by_one)
    if chunks > 1 and micros >= 2 * ranks and micros % ranks == 0:  # in units of 1F1B's p: 1 + (p - 1) / (p v)
        assert Fraction(one_by_one[0], ranks * chunks) == 1 + Fraction(ranks - 1, ranks * chunks)


def test_activations_by_stage_and_half_freed_by_the_input_gradient() -> None:
    schedule = build("zb-h1", 2, 2, 2)  # 0F0,0F1,0I0,0W0,0I1,0W1 / 1F0,1I0,1F1,1I1,1W0,1W1
    assert peak_in_flight(schedule, of_stage=[10, 3]) == (20, 6)
    assert peak_in_flight(schedule, of_stage=[10, 4], after_input=0) == (20, 4)
    with pytest.raises(ScheduleError, match="3 sizes of activations are given for 2 stages"):
        peak_in_flight(schedule, of_stage=[1, 2, 3])


@given(st.integers(1, 9), st.integers(1, 60), st.integers(0, 12))
def test_groups_are_whole_and_never_smaller_than_the_pipeline(ranks: int, micros: int, more: int) -> None:
    sizes = group_sizes(ranks, micros, ranks + more)
    assert sum(sizes) == micros
    assert min(sizes) >= min(ranks, micros)
    if micros % (ranks + more) == 0:
        assert set(sizes) == {ranks + more}


def test_megatrons_last_group_is_kept_where_it_works() -> None:
    assert group_sizes(4, 14, 5) == [5, 5, 4]
    assert group_sizes(4, 13, 5) == [7, 6]  # a last group of three would come back too late


@given(schedules(most_ranks=6, most_micros=12), st.data())
@settings(max_examples=150, deadline=None)
def test_messages_never_lock_or_mix_though_both_sides_block_and_nothing_is_tagged(
    schedule: Schedule, data: st.DataObject
) -> None:
    times = st.integers(0, 3)  # also actions that take no time
    costs = {action: data.draw(times) for row in schedule.actions for action in row[:4]}
    rows = lower(schedule, lambda action: costs.get(action, 1), data.draw(times))
    hops = sum(a != b for a, b in zip(schedule.rank_of, schedule.rank_of[1:], strict=False))
    assert check_rendezvous(rows) == 2 * hops * schedule.micros
    for rank, row in enumerate(rows):
        assert tuple(op for op in row if isinstance(op, Action)) == schedule.actions[rank]
        there = set()  # what an action uses is received before it, what it makes is sent after it
        for op in row:
            if isinstance(op, Action):
                there.add(op)
                if op.kind is Kind.F and op.stage and schedule.rank_of[op.stage - 1] != rank:
                    assert ("F", op.stage, op.micro) in there
            elif str(op).split("_")[0].endswith("RECV"):
                there.add(("F" if op.message.forward else "B", op.message.target, op.message.micro))
            elif op.message.forward:
                assert Action(Kind.F, op.message.source, op.message.micro) in there


@given(schedules(most_ranks=6, most_micros=12), st.integers(0, 3))
@settings(max_examples=60, deadline=None)
def test_what_the_first_stage_has_for_a_tied_head_comes_once_and_in_order(schedule: Schedule, transfer: int) -> None:
    rows, plain = lower(schedule, transfer=transfer, tied=True), lower(schedule, transfer=transfer)
    first, last = schedule.rank_of[0], schedule.rank_of[-1]
    assert check_rendezvous(rows) == check_rendezvous(plain) + schedule.micros * (first != last)
    backwards = [a.micro for a in schedule.actions[first] if not a.stage and a.kind in (Kind.B, Kind.I)]
    for rank, row in enumerate(rows):
        extra = [op for op in row if not isinstance(op, Action) and op.message.embedded]
        assert [op for op in row if op not in extra] == list(plain[rank])  # all else stays as it is
        at_an_end = first != last and rank in (first, last)
        assert [op.message.micro for op in extra] == (backwards if at_an_end else [])
        for op in extra if rank == first else ():  # sent after it was made
            made = [n for n, a in enumerate(row) if a in (Action(k, 0, op.message.micro) for k in (Kind.B, Kind.I))]
            assert made[0] < row.index(op)


def test_the_obvious_order_of_messages_locks() -> None:
    """Receive, compute, send, one after the other: 1F1B's neighbours both want to send."""
    from resilin.parallel.pipeline import Message, Receive, Send, result_of

    schedule = build("1f1b", 2, 2, 2)
    rows = []
    for row in schedule.actions:
        ops: list[object] = []
        for action in row:
            source = action.stage - 1 if action.kind is Kind.F else action.stage + 1
            if 0 <= source < 2:
                ops.append(Receive(Message(source, action.stage, action.micro), source))
            ops.append(action)
            if (made := result_of(action, 2)) is not None:
                ops.append(Send(made, made.target))
        rows.append(ops)
    with pytest.raises(ScheduleError, match="locks: rank 0 is at 0SEND_F1 with rank 1; rank 1 is at 1SEND_B0"):
        check_rendezvous(rows)  # type: ignore[arg-type]


def test_messages_that_cross_are_told_apart() -> None:
    rows = [list(row) for row in lower(build("gpipe", 2, 2, 2))]
    first = [number for number, op in enumerate(rows[1]) if str(op).startswith("1RECV")]
    rows[1][first[0]], rows[1][first[1]] = rows[1][first[1]], rows[1][first[0]]
    with pytest.raises(ScheduleError, match=r"does 1RECV_F1 while rank 0 does 0SEND_F0|0SEND_F0 while .* 1RECV_F1"):
        check_rendezvous(rows)


def test_where_stages_live() -> None:
    assert loop(6, 3) == (0, 1, 2, 0, 1, 2)
    assert vee(6, 3) == (0, 1, 2, 2, 1, 0)
    assert vee(8, 2) == (0, 1, 1, 0, 0, 1, 1, 0)
    assert build("zb-v", 6, 3, 4).stages_of(1) == (1, 4)
    with pytest.raises(ScheduleError, match="7 stages cannot be shared evenly by 3 ranks: use 6 or 9 stages"):
        loop(7, 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("2f2b", 4, 4, 4), r"no pipeline schedule '2f2b': use one of gpipe, 1f1b, interleaved, zb-h1"),
        (("1f1b", 8, 4, 4), r"1f1b has 1 stage a rank, not 8 on 4; with so many: gpipe, interleaved"),
        (("zb-v", 12, 4, 4), r"zb-v has 2 stages a rank, not 12 on 4; with so many: gpipe, interleaved, zb-inter"),
        (("interleaved", 9, 4, 4), "9 stages cannot be shared evenly by 4 ranks: use 8 or 12"),
        (("interleaved", 8, 4, 4, 3), "groups of 3 micro-batches are too small for 4 ranks.*use at least 4"),
        (("1f1b", 4, 4, 4, 4), "1f1b has no groups of micro-batches: leave group out, or use one of interleaved"),
        (("1f1b", 4, 4, 0), "at least one micro-batch, not 0"),
        (("1f1b", 0, 0, 4), "at least one rank and one stage, not 0 and 0"),
    ],
)
def test_what_cannot_be_built_is_said(arguments: tuple, message: str) -> None:
    with pytest.raises(ScheduleError, match=message):
        build(*arguments)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0F0,0X0", "line 1, cell 2: '0X0' is no action: write stage, kind"),
        ("0F0,0B0\n1F0,1SEND_B0", "line 2, cell 2: '1SEND_B0' is no action"),
        ("", "the schedule is empty"),
        ("0F0,0B0\n2F0,2B0", "stage 1 is on no line, though stage 2 is"),
    ],
)
def test_a_file_that_is_no_schedule_is_said(text: str, message: str) -> None:
    with pytest.raises(ScheduleError, match=message):
        Schedule.parse(text)


@pytest.mark.parametrize("name", METHODS)
def test_sixty_four_ranks_and_512_micro_batches(name: str) -> None:
    """Up to 196,608 actions: work out of proportion to them would not end here."""
    validate(build(name, 64 * (METHODS[name].chunks or 2), 64, 512))
