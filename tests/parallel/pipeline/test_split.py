"""Layers on stages: torchtitan's shares, and the exact optimum against every split there is."""

from __future__ import annotations

import itertools
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from resilin.parallel.pipeline import ScheduleError, Split, balanced, by_count, even


@given(st.integers(1, 40), st.integers(1, 12), st.integers(0, 3), st.integers(0, 3))
@settings(deadline=None)
def test_even_shares_differ_by_one_when_the_ends_are_counted(
    layers: int, stages: int, embedding: int, head: int
) -> None:
    total = layers + embedding + head
    if stages == 1:
        assert even(layers, stages, embedding, head).counts() == (layers,)
        return
    if stages > total or embedding > total // stages or head > total // stages:
        with pytest.raises(ScheduleError):
            even(layers, stages, embedding, head)
        return
    counted = list(even(layers, stages, embedding, head).counts())
    counted[0] += embedding
    counted[-1] += head
    assert sum(counted) == total
    assert set(counted) <= {total // stages, -(-total // stages)}
    assert counted == sorted(counted, reverse=True)


def test_shares_as_torchtitan_gives_them() -> None:
    assert even(32, 8).counts() == (4, 5, 4, 4, 4, 4, 4, 3)
    assert even(6, 4).counts() == (1, 2, 2, 1)
    assert even(2, 4).counts() == (0, 1, 1, 0)
    assert by_count(6, 2, 2).counts() == (1, 2, 2, 1)
    assert even(7, 3, embedding=0, head=0).counts() == (3, 2, 2)


def test_shares_that_cannot_be_are_said() -> None:
    with pytest.raises(ScheduleError, match=r"5 stages are more than 2 layers with embedding \(1\).*at most 4"):
        even(2, 5)
    with pytest.raises(ScheduleError, match="the embedding counts as 3 layers, but a stage's share is 2 of 8"):
        even(4, 4, embedding=3)
    with pytest.raises(ScheduleError, match="the head counts as 3 layers, but a stage's share is 2 of 8"):
        even(4, 4, head=3)
    with pytest.raises(ScheduleError, match=r"3 layers a stage make 3 stages of 8 .* 2 ranks .*use 2 layers a stage"):
        by_count(6, 3, 2)
    with pytest.raises(ScheduleError, match="too few layers for so many ranks"):
        by_count(2, 1, 8)
    with pytest.raises(ScheduleError, match="at least one layer and one stage"):
        even(0, 1)
    with pytest.raises(ScheduleError, match="cannot count as -1"):
        even(4, 1, embedding=-1)


def every_split(layers: int, stages: int, empty_first: bool, empty_last: bool) -> list[Split]:
    found = []
    for inner in itertools.combinations_with_replacement(range(layers + 1), stages - 1):
        split = Split((0, *inner, layers))
        empty = {stage for stage, count in enumerate(split.counts()) if count == 0}
        if empty <= ({0} if empty_first else set()) | ({stages - 1} if empty_last else set()):
            found.append(split)
    return found


cost_ = st.integers(0, 9) | st.fractions(0, 9, max_denominator=4)


@given(st.data())
@settings(max_examples=120, deadline=None)
def test_balanced_is_the_best_of_all_splits_and_moves_the_fewest_layers(data: st.DataObject) -> None:
    layers = data.draw(st.lists(cost_, min_size=1, max_size=12))
    embedding, head = data.draw(st.none() | cost_), data.draw(st.none() | cost_)
    stages = data.draw(st.integers(1, min(4, len(layers) + (embedding is not None) + (head is not None))))
    loads = data.draw(st.lists(st.sampled_from([1, 2, Fraction(4, 3)]), min_size=stages, max_size=stages))
    every = every_split(len(layers), stages, embedding is not None, head is not None)
    now = data.draw(st.none() | st.sampled_from(every))

    def slowest(split: Split) -> Fraction:
        return max(l * c for l, c in zip(loads, split.costs(layers, embedding or 0, head or 0), strict=True))  # noqa: E741

    def moved(split: Split) -> int:
        return 0 if now is None else sum(split.stage_of(i) != now.stage_of(i) for i in range(len(layers)))

    best = min(every, key=lambda split: (slowest(split), moved(split), split.bounds))
    assert balanced(layers, stages, embedding, head, loads, now=now) == best


@given(st.data())
@settings(max_examples=80, deadline=None)
def test_what_a_stage_may_not_hold_it_does_not(data: st.DataObject) -> None:
    layers = data.draw(st.lists(st.integers(0, 9), min_size=2, max_size=8))
    sizes = data.draw(st.lists(st.integers(1, 4), min_size=len(layers), max_size=len(layers)))
    stages = data.draw(st.integers(1, min(4, len(layers))))
    room = data.draw(st.lists(st.integers(1, 12), min_size=stages, max_size=stages))
    fitting = [
        split
        for split in every_split(len(layers), stages, False, False)
        if all(size <= most for size, most in zip(split.costs(sizes), room, strict=True))
    ]

    def allowed(stage: int, first: int, end: int) -> bool:
        return sum(sizes[first:end]) <= room[stage]

    if not fitting:
        with pytest.raises(ScheduleError, match=r"no split .* is allowed"):
            balanced(layers, stages, allowed=allowed)
        return
    found = balanced(layers, stages, allowed=allowed)
    assert found in fitting
    assert max(found.costs(layers)) == min(max(split.costs(layers)) for split in fitting)


def test_the_many_optima_of_one_model() -> None:
    """Twelve splits reach 6; which one is taken depends on what there is."""
    costs = [4, *[1] * 10, 6]
    optimal = [split for split in every_split(12, 4, False, False) if max(split.costs(costs)) == 6]
    assert len(optimal) == 12
    for now in optimal:
        assert balanced(costs, 4, now=now) == now
    assert balanced(costs, 4) == min(optimal, key=lambda split: split.bounds)


def test_floats_that_differ_by_rounding_are_equal() -> None:
    costs = [0.1] * 30
    now = Split((0, 10, 20, 30))
    assert balanced(costs, 3, now=now) == now


def test_a_heavy_head_gets_fewer_layers() -> None:
    assert balanced([1] * 12, 4, embedding=0, head=3).counts() == (3, 4, 4, 1)
    assert balanced([1] * 4, 3, embedding=9, head=9).counts() == (0, 4, 0)


def test_a_stage_with_fewer_replicas_gets_fewer_layers() -> None:
    assert balanced([1] * 12, 3, loads=[1, 2, 1]).counts() == (5, 2, 5)


def test_a_hundred_layers_on_many_stages() -> None:
    split = balanced([1 + layer % 3 for layer in range(126)], 64, embedding=1, head=4)
    assert split.layers == 126
    assert max(split.costs([1 + layer % 3 for layer in range(126)], 1, 4)) == 5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([1, 1], 3), "2 layers cannot fill 3 stages: use at most 2"),
        (([1, -1], 2), "cannot be negative"),
        (([1, 1], 2, None, None, [1]), "1 loads are given for 2 stages"),
        (([1, 1], 2, None, None, [], None, Split((0, 1))), "the present split has 1 layers in 1 stages, not 2 in 2"),
    ],
)
def test_what_cannot_be_balanced_is_said(arguments: tuple, message: str) -> None:
    with pytest.raises(ScheduleError, match=message):
        balanced(*arguments)


def test_a_split_knows_its_layers() -> None:
    split = Split((0, 0, 3, 5))
    assert [split.stage_of(layer) for layer in range(5)] == [1, 1, 1, 2, 2]
    assert [list(split.layers_of(stage)) for stage in range(3)] == [[], [0, 1, 2], [3, 4]]
    assert split.costs([1, 2, 3, 4, 5], embedding=10, head=20) == (10, 6, 29)
    with pytest.raises(ScheduleError, match="no layer 5 among 5"):
        split.stage_of(5)
    with pytest.raises(ScheduleError, match="3 costs are given for 5 layers"):
        split.costs([1, 2, 3])
    with pytest.raises(ScheduleError, match="bounds of stages rise from 0"):
        Split((0, 3, 2))
