"""The power law of a loss curve: planted numbers come back, and departures are seen."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from resilin.planner.power_law import PowerLaw, departure, fit_power_law, log_uniform, middle

A = st.floats(0.5, 50)
K = st.floats(0.02, 1.0)


@given(A, K)
def test_a_fit_recovers_any_planted_law_from_noiseless_points_to_ten_digits(a: float, k: float) -> None:
    t = np.geomspace(30, 30000, 60)
    law = fit_power_law(t, a * t**-k)
    assert law.a == pytest.approx(a, rel=1e-10)
    assert law.k == pytest.approx(k, abs=1e-10)
    assert law.c == 0


@given(st.floats(1.0, 20), st.floats(0.15, 1.0), st.floats(0.1, 4.0))
def test_a_fit_with_a_floor_recovers_any_planted_law_to_four_digits(a: float, k: float, c: float) -> None:
    t = np.geomspace(30, 100000, 80)
    law = fit_power_law(t, a * t**-k + c, floor=True)
    assert law.a == pytest.approx(a, rel=1e-4)
    assert law.k == pytest.approx(k, abs=1e-4)
    assert law.c == pytest.approx(c, abs=1e-4)


def test_where_there_is_no_floor_a_fit_with_one_finds_none() -> None:
    t = np.geomspace(10, 10000, 50)
    law = fit_power_law(t, 5 * t**-0.2, floor=True)
    assert law.c == pytest.approx(0, abs=1e-4)
    assert law.k == pytest.approx(0.2, abs=1e-4)


@given(A, K, st.integers(2, 100))
def test_resampling_keeps_a_power_law_exact(a: float, k: float, bins: int) -> None:
    t = np.arange(1, 2000)
    law = fit_power_law(*log_uniform(t, a * t**-k, bins))
    assert law.a == pytest.approx(a, rel=1e-9)
    assert law.k == pytest.approx(k, abs=1e-9)


def test_resampling_gives_each_octave_the_same_weight() -> None:
    # Every-step samples of a curve that bends are fitted where most steps are; resampled ones over the whole range.
    t = np.arange(1, 4097)
    losses = np.where(t < 256, 10 * t**-0.3, 10 * 256**-0.3 * (t / 256) ** -0.1)
    raw, even = fit_power_law(t, losses), fit_power_law(*log_uniform(t, losses, 48))
    assert raw.k < 0.15
    assert 0.17 < even.k < 0.28


def test_noise_widens_sigma_and_not_the_answer() -> None:
    rng = np.random.default_rng(0)
    t = np.geomspace(50, 50000, 400)
    law = fit_power_law(t, 8 * t**-0.15 * np.exp(0.02 * rng.standard_normal(400)))
    assert law.sigma == pytest.approx(0.02, rel=0.15)
    assert law.k == pytest.approx(0.15, abs=0.003)
    assert law.points == 400


@given(A, K, st.sampled_from([0.0, 0.7]), st.floats(10, 1e6))
def test_steps_to_a_loss_are_where_the_law_has_that_loss(a: float, k: float, c: float, t: float) -> None:
    law = PowerLaw(a, k, c)
    assert law.steps_to(law.loss(t)) == pytest.approx(t, rel=1e-6)
    assert law.loss(2 * t) < law.loss(t)


@given(st.floats(0.05, 0.3), st.floats(0.35, 1.0), st.floats(10, 1e8))
def test_two_laws_cross_where_their_losses_are_equal(slow: float, fast: float, t: float) -> None:
    first, second = PowerLaw(5 * t**slow, slow), PowerLaw(5 * t**fast, fast)
    assert first.crossing(second) == pytest.approx(t, rel=1e-6)
    assert second.crossing(first) == pytest.approx(t, rel=1e-6)
    assert first.crossing(PowerLaw(4 * t**slow, slow)) is None


def test_a_loss_below_the_floor_is_never_reached() -> None:
    assert math.isinf(PowerLaw(5, 0.3, 1.0).steps_to(1.0))
    assert math.isinf(PowerLaw(5, -0.1).steps_to(1.0))


def test_warm_up_the_first_twentieth_and_the_decay_are_left_out() -> None:
    t = list(range(1, 101))
    kept, _ = middle(t, [1.0] * 100, total=100)
    assert (kept[0], kept[-1]) == (6, 100)
    kept, _ = middle(t, [1.0] * 100, total=100, warmup=20, decay_from=80)
    assert (kept[0], kept[-1]) == (21, 80)


def test_leaving_the_law_is_seen_at_three_sigma_and_told_from_above_or_below() -> None:
    rng = np.random.default_rng(1)
    t = np.geomspace(50, 5000, 200)
    losses = 6 * t**-0.2 * np.exp(0.01 * rng.standard_normal(200))
    law = fit_power_law(t, losses)
    later = np.geomspace(5100, 20000, 30)
    line = 6 * later**-0.2
    assert departure(law, later, line) is None
    assert departure(law, later, line * math.exp(2.5 * law.sigma)) is None
    over = departure(law, later, line * np.linspace(1, 1.3, 30))
    assert over is not None
    assert over.above
    assert 3 < over.sigmas < 6
    decay = departure(law, later, line * np.linspace(1, 0.8, 30))
    assert decay is not None
    assert not decay.above


def test_one_odd_point_is_no_departure_when_several_in_a_row_are_asked_for() -> None:
    law = PowerLaw(6, 0.2, sigma=0.01)
    t = np.arange(100, 120)
    losses = 6 * t**-0.2
    losses[5] *= 1.2
    losses[9] *= 0.8
    assert departure(law, t, losses, run=3) is None
    losses[12:] *= 1.1
    found = departure(law, t, losses, run=3)
    assert found is not None
    assert found.t == 112


@pytest.mark.parametrize(
    ("t", "losses", "says"),
    [
        ([1, 2], [1.0], "one loss for each t"),
        ([1, 2], [1.0, math.nan], "point 1 of the curve is not positive and finite"),
        ([0, 2], [1.0, 1.0], "point 0"),
        ([3, 3], [1.0, 1.1], "1 distinct t are too few"),
    ],
)
def test_a_curve_that_cannot_be_fitted_says_why(t: list[float], losses: list[float], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        fit_power_law(t, losses)
