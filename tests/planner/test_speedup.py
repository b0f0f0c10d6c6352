"""Speed-ups: one for equal curves, multiplying at a common loss."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from resilin.planner.speedup import Trace, chain, speedup


@st.composite
def traces(draw: st.DrawFn, falling: bool = False) -> Trace:
    n = draw(st.integers(1, 8))
    times = sorted(draw(st.sets(st.floats(0.1, 1e4), min_size=n, max_size=n)))
    losses = draw(st.lists(st.floats(0.5, 5), min_size=n, max_size=n))
    return Trace(tuple(times), tuple(sorted(losses, reverse=True) if falling else losses))


@given(traces())
def test_a_plan_is_exactly_as_fast_as_itself(trace: Trace) -> None:
    assert speedup(trace, trace) == 1
    assert speedup(trace, trace, trace.best) == 1


@given(st.lists(traces(falling=True), min_size=2, max_size=5))
def test_the_speed_ups_of_a_chain_multiply_to_the_whole(plans: list[Trace]) -> None:
    steps, whole = chain(plans)
    assert math.prod(steps) == pytest.approx(whole, rel=1e-12)
    assert len(steps) == len(plans) - 1


@given(traces(), st.floats(0.1, 10))
def test_a_plan_that_does_everything_x_times_sooner_has_speed_up_x(trace: Trace, factor: float) -> None:
    times = tuple(time / factor for time in trace.times)
    assume(all(later > earlier for earlier, later in itertools.pairwise(times)))
    assert speedup(trace, Trace(times, trace.losses)) == pytest.approx(factor)


def test_the_time_to_a_loss_lies_on_the_line_between_two_points() -> None:
    trace = Trace((10.0, 20.0, 30.0), (3.0, 2.0, 1.0))
    assert trace.time_to(2.5) == 15
    assert trace.time_to(1.0) == 30
    assert trace.time_to(4.0) == 10
    assert math.isinf(trace.time_to(0.9))


def test_the_first_time_counts_where_a_curve_rises_again() -> None:
    over_fitted = Trace((10.0, 20.0, 30.0, 40.0), (3.0, 2.0, 2.5, 2.9))
    assert over_fitted.time_to(2.9) == pytest.approx(11)
    better = Trace((5.0, 10.0), (3.0, 1.5))
    assert speedup(over_fitted, better, over_fitted.best) == pytest.approx(20 / (5 + 5 * 1.0 / 1.5))


def test_a_plan_that_never_arrives_has_speed_up_zero_and_a_baseline_that_does_not_is_an_error() -> None:
    good, bad = Trace((1.0, 2.0), (3.0, 1.0)), Trace((1.0, 2.0), (3.0, 2.0))
    assert speedup(good, bad) == 0
    with pytest.raises(ValueError, match="never reaches a loss of 1: choose 2 or more"):
        speedup(bad, good, 1.0)


def test_a_trace_that_makes_no_sense_is_refused() -> None:
    with pytest.raises(ValueError, match="one loss for each time"):
        Trace((1.0,), ())
    with pytest.raises(ValueError, match="positive and ascending"):
        Trace((2.0, 1.0), (1.0, 1.0))
