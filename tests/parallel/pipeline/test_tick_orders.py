"""Stages of unlike numbers of members that keep in step: all of a stage do the same, and every row finds its place."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from resilin.parallel.micro_batches import in_runs, shared_batches
from resilin.parallel.pipeline.messages import Op, Part, Receive, Send, check_rendezvous
from resilin.parallel.pipeline.schedule import Action
from resilin.parallel.pipeline.simulate import Costs
from resilin.parallel.pipeline.tick_orders import TickOrders

SIZES = st.lists(st.integers(1, 4), min_size=2, max_size=4)


def orders(sizes: list[int], count: int, micro: int) -> list[TickOrders]:
    def evaluated(batches: int) -> list[list[range]]:
        return [in_runs(batches, size) for size in sizes]

    return [TickOrders(sizes, rank, lambda _: count, micro, evaluated, Costs()) for rank in range(sum(sizes))]


def stage_of(sizes: list[int], rank: int) -> tuple[int, int]:
    stage = 0
    while rank >= sizes[stage]:
        rank, stage = rank - sizes[stage], stage + 1
    return stage, rank


@given(SIZES, st.integers(1, 24), st.integers(1, 4))
def test_all_of_a_stage_do_the_same_and_every_row_goes_and_comes_once(sizes: list[int], count: int, micro: int):
    rows: list[list[Op]] = [list(one.training(3, 0)) for one in orders(sizes, count, micro)]
    check_rendezvous(rows)
    cut = shared_batches(count, micro, sizes)
    for rank, ops in enumerate(rows):
        stage, place = stage_of(sizes, rank)
        actions = [op for op in ops if isinstance(op, Action)]
        assert actions == [op for op in rows[sum(sizes[:stage])] if isinstance(op, Action)]
        ticks = len(cut[stage]) // sizes[stage]
        mine = [slot for part in cut[stage][place * ticks : (place + 1) * ticks] for slot in part]
        for kind, forward, none in (
            (Receive, True, not stage),
            (Send, True, stage == len(sizes) - 1),
            (Receive, False, stage == len(sizes) - 1),
            (Send, False, not stage),
        ):
            parts = [op.message for op in ops if type(op) is kind and op.message.forward is forward]
            assert all(isinstance(part, Part) for part in parts)
            slots = [slot for part in parts for slot in range(part.rows.start, part.rows.end)]
            assert sorted(slots) == ([] if none else mine)


@given(SIZES, st.integers(1, 20))
def test_in_an_evaluation_too_all_of_a_stage_compute_equally_often(sizes: list[int], batches: int):
    for rank, one in enumerate(orders(sizes, 8, 1)):
        stage, _ = stage_of(sizes, rank)
        rounds = -(-batches // sizes[stage])
        assert [op.micro for op in one.evaluating(rounds, batches) if isinstance(op, Action)] == list(range(rounds))


@given(st.integers(1, 40), st.integers(1, 5), SIZES)
def test_every_tick_is_shared_by_all_of_a_stage(count: int, micro: int, workers: list[int]):
    cut = shared_batches(count, micro, workers)
    ticks = {len(stage) // each for stage, each in zip(cut, workers, strict=True)}
    assert len(ticks) == 1
    for stage, each in zip(cut, workers, strict=True):
        assert sorted(slot for part in stage for slot in part) == list(range(count))
        assert max(map(len, stage)) <= micro
        for tick in range(*ticks):
            shares = stage[tick :: next(iter(ticks))]
            assert len(shares) == each
            assert max(map(len, shares)) - min(map(len, shares)) <= 1
