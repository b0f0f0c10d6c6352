"""The monitor: the law comes back from a run's events, and learning repeated data by heart is noticed."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from resilin.planner.monitor import Monitor
from resilin.planner.repeats import effective_tokens
from resilin.run.events import Evaluated, StepDone


def step(number: int, loss: float) -> StepDone:
    return StepDone(step=number, loss=loss, lr=1e-3, grad_norm=1.0, units=512, seconds=0.1)


def watch(monitor: Monitor, losses: list[float]) -> Monitor:
    for number, loss in enumerate(losses, start=1):
        monitor(step(number, loss))
    return monitor


@settings(deadline=None)
@given(st.floats(2, 20), st.floats(0.03, 0.5))
def test_the_live_fit_finds_the_exponent_and_the_final_loss_early(a: float, k: float) -> None:
    total = 4000
    monitor = watch(Monitor(total), [a * t**-k for t in range(1, 1201)])
    reading = monitor.readings[-1]
    assert reading.law is not None
    assert reading.law.k == pytest.approx(k, rel=0.01)
    assert reading.predicted_final == pytest.approx(a * total**-k, rel=0.005)
    assert all(abs(found.residual) < 1e-3 for found in monitor.departures)


def test_points_stand_at_quarter_octaves_and_readings_say_the_law() -> None:
    said: list[str] = []
    monitor = watch(Monitor(1000, tell=said.append), [5 * t**-0.2 for t in range(1, 1001)])
    steps = [reading.step for reading in monitor.readings]
    expected = sorted({math.ceil(2 ** (k / 4) - 1e-9) for k in range(40)} & set(range(1, 1001)))
    assert steps == expected
    assert "too few points" in said[0]
    assert "t^-0.2" in said[-1]
    assert "final loss 1.25" in said[-1]


def test_noise_does_not_throw_the_prediction_off() -> None:
    noise = random.Random(0)
    monitor = watch(Monitor(8000), [6 * t**-0.15 * math.exp(noise.gauss(0, 0.05)) for t in range(1, 2401)])
    assert monitor.readings[-1].predicted_final == pytest.approx(6 * 8000**-0.15, rel=0.01)


def test_the_decay_of_the_learning_rate_is_not_fitted() -> None:
    losses = [5 * t**-0.2 * (1 if t <= 800 else 0.9) for t in range(1, 1001)]
    monitor = watch(Monitor(1000, decay_from=800), losses)
    assert monitor.law is not None
    assert monitor.law.k == pytest.approx(0.2, abs=0.005)
    blind = watch(Monitor(1000), losses)
    assert blind.law is not None
    assert abs(blind.law.k - 0.2) > 0.005


def test_leaving_the_law_is_told() -> None:
    losses = [5 * t**-0.2 for t in range(1, 601)] + [5 * 600**-0.2 * (1 + (t - 600) / 600) for t in range(601, 1201)]
    said: list[str] = []
    monitor = watch(Monitor(1200, tell=said.append), losses)
    left = [found for found in monitor.departures if abs(found.residual) > 0.01]
    assert left[0].above
    assert 580 < left[0].t < 800
    assert any("leaves its power law" in line and "over-fitting" in line for line in said)


def test_one_odd_point_is_no_departure() -> None:
    losses = [5 * t**-0.2 for t in range(1, 1201)]
    losses[500:530] = [loss * 1.5 for loss in losses[500:530]]
    monitor = watch(Monitor(1200), losses)
    assert all(abs(found.residual) < 0.05 for found in monitor.departures)


def run_over_repeats(held_out_rises: bool, harder: float = 0.0, epochs: bool = True) -> Monitor:
    """300 steps an epoch; on repeated data the training loss keeps falling, the held-out loss may not follow."""
    noise = random.Random(1)
    monitor = Monitor(1500, steps_per_epoch=300 if epochs else None)
    for t in range(1, 1501):
        law = 5 * t**-0.2
        by_heart = 0.3 * max(0.0, (t - 300) / 1200) if held_out_rises else 0.0
        monitor(step(t, (law - by_heart) * math.exp(noise.gauss(0, 0.02))))
        if t % 100 == 0:
            monitor(Evaluated(step=t, name="validation", metrics={"loss": law + harder}))
    return monitor


def test_over_fitting_at_an_epoch_boundary_is_declared_with_a_proposal() -> None:
    found = run_over_repeats(held_out_rises=True).over_fitting
    assert found is not None
    assert 300 < found.step <= 700
    assert found.standard_errors > 3
    assert "stop here or train on new data" in found.sentence()


def test_new_data_are_never_over_fitted_and_a_harder_held_out_text_is_allowed_for() -> None:
    assert run_over_repeats(held_out_rises=True, epochs=False).over_fitting is None
    assert run_over_repeats(held_out_rises=False).over_fitting is None
    assert run_over_repeats(held_out_rises=False, harder=0.3).over_fitting is None
    assert run_over_repeats(held_out_rises=True, harder=0.3).over_fitting is not None


def test_losses_that_are_not_finite_are_passed_over() -> None:
    monitor = Monitor(100)
    watch(monitor, [5.0, math.nan, 4.0, math.inf, 3.0])
    monitor(Evaluated(step=5, name="validation", metrics={"loss": math.nan}))
    assert all(math.isfinite(reading.loss) for reading in monitor.readings)


@given(st.floats(1e3, 1e12), st.floats(0.01, 100))
def test_a_repeated_token_is_worth_less_than_a_fresh_one_and_more_than_nothing(unique: float, epochs: float) -> None:
    tokens = unique * epochs
    worth = effective_tokens(tokens, unique)
    if epochs <= 1:
        assert worth == tokens
    else:
        assert unique < worth < tokens
        assert effective_tokens(1.5 * tokens, unique) >= worth


def test_four_epochs_cost_almost_nothing_and_more_than_forty_gain_nothing() -> None:
    assert effective_tokens(4e9, 1e9) > 0.9 * 4e9
    assert effective_tokens(1e12, 1e9) < 17e9
