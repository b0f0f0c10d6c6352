"""What stands out in a curve is still there when it is thinned out; what a resume took back is not."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from resilin.dashboard.curves import SHOWN, Steps, curves, means, thinned
from resilin.dashboard.step_lines import COLUMNS


def columns(numbers: list[int], losses: list[float] | None = None) -> np.ndarray:
    table = dict.fromkeys(COLUMNS, [1.0] * len(numbers))
    table |= {"step": [float(n) for n in numbers], "time": [100.0 + n for n in numbers]}
    table["loss"] = losses or [float(n) for n in numbers]
    return np.array([table[name] for name in COLUMNS])


def steps_of(losses: list[float]) -> Steps:
    steps = Steps()
    steps.add(columns(list(range(1, len(losses) + 1)), losses))
    return steps


@settings(max_examples=80)
@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=300), st.integers(4, 40))
def test_a_thinned_curve_has_few_points_and_all_extremes(losses: list[float], points: int):
    steps = steps_of(losses)
    x, y = thinned(steps, "loss", "step", -np.inf, np.inf, points)
    assert len(x) <= max(points, 1) or len(losses) <= points
    assert (np.diff(x) > 0).all()
    assert y.min() == min(losses)
    assert y.max() == max(losses)
    assert all(losses[int(at) - 1] == value for at, value in zip(x, y, strict=True))


@settings(max_examples=50)
@given(st.lists(st.floats(-9, 9), min_size=40, max_size=200), st.integers(4, 16))
def test_each_stretch_gives_its_lowest_and_its_highest(losses: list[float], points: int):
    x, _ = thinned(steps_of(losses), "loss", "step", -np.inf, np.inf, points)
    if len(losses) <= points:
        return
    bounds = np.linspace(0, len(losses), points // 2 + 1).astype(int)
    expected = set()
    for low, high in pairwise(bounds):
        part = losses[low:high]
        expected |= {low + part.index(min(part)) + 1, low + part.index(max(part)) + 1}
    assert set(x.astype(int)) == expected


def test_a_part_reaches_one_step_beyond_what_is_seen():
    x, _ = thinned(steps_of([0.0] * 20), "loss", "step", 5, 8, 100)
    assert list(x) == [4, 5, 6, 7, 8, 9]
    x, _ = thinned(steps_of([0.0] * 20), "loss", "time", 105, 106, 100)
    assert list(x) == [104, 105, 106, 107]


def test_what_is_not_finite_is_a_gap_in_json():
    told = curves(steps_of([1.0, float("nan"), float("inf"), 2.0]), "step", -np.inf, np.inf, 100)
    nothing = {"x": [], "y": []}
    assert told["loss"] == {"x": [1.0, 2.0, 3.0, 4.0], "y": [1.0, None, None, 2.0], "mean": nothing}
    assert set(told) == set(SHOWN)


def test_a_stretch_of_nothing_but_nan_hides_no_other():
    x, y = thinned(steps_of([float("nan")] * 50 + [1.0] * 50), "loss", "step", -np.inf, np.inf, 8)
    assert np.isnan(y[0])
    assert y[-1] == 1.0
    assert len(x) <= 8


def test_means_are_of_whole_stretches_and_not_of_few_steps():
    x, y = means(steps_of([1.0, 3.0] * 40), "loss", "step", -np.inf, np.inf, 10)
    assert list(y) == [2.0] * 10
    assert list(x) == [8 * place + 4.5 for place in range(10)]
    assert means(steps_of([1.0] * 39), "loss", "step", -np.inf, np.inf, 10)[0].size == 0


def test_a_step_that_is_told_again_takes_the_place_of_what_came_after_it():
    steps = Steps()
    steps.add(columns([1, 2, 3, 4, 5]))
    steps.add(columns([4, 5, 6], [40.0, 50.0, 60.0]))
    assert list(steps["loss"]) == [1, 2, 3, 40, 50, 60]
    steps.add(columns([7, 5, 6, 7], [1.0, 51.0, 61.0, 71.0]))  # in one piece
    assert list(steps["step"]) == [1, 2, 3, 4, 5, 6, 7]
    assert list(steps["loss"]) == [1, 2, 3, 40, 51, 61, 71]
    steps.cut(2)
    assert steps.count == 2
    assert steps.last()["loss"] == 2.0


def test_many_pieces_are_one_table():
    steps = Steps()
    for first in range(1, 20001, 100):
        steps.add(columns(list(range(first, first + 100))))
    assert steps.count == 20000
    assert (steps["step"] == np.arange(1, 20001)).all()
    assert steps["throughput"] == pytest.approx(np.ones(20000))


def test_without_steps_there_is_nothing():
    told = curves(Steps(), "step", -np.inf, np.inf, 100)
    nothing = {"x": [], "y": []}
    assert all(one == {**nothing, "mean": nothing} for one in told.values())
    assert Steps().last() is None
