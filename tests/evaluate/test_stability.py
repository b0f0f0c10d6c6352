from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from resilin.evaluate.stability import (
    PAPER_LEARNING_RATES,
    best_lr,
    highest_stable_lr,
    lr_sensitivity,
    lr_sensitivity_over_sets,
)

loss = st.floats(0.0, 12.0)
curve = st.lists(loss, min_size=1, max_size=9)


def test_sensitivity_of_the_two_curves_measured_for_the_note():
    without = [2.713, 2.413, 2.244, 2.213, 2.386, 2.704, 2.814]
    with_norm = [2.713, 2.415, 2.247, 2.176, 2.260, 2.388, 2.446]
    assert lr_sensitivity(without, 5.545) == pytest.approx(0.285, abs=5e-4)
    assert lr_sensitivity(with_norm, 5.545) == pytest.approx(0.202, abs=5e-4)


@given(loss, st.integers(1, 9), st.floats(0.0, 5.0))
def test_a_flat_curve_has_no_sensitivity(value, count, above):
    assert lr_sensitivity([value] * count, value + above) == 0.0


@given(curve, loss, st.floats(-5.0, 5.0))
def test_a_shift_of_all_losses_changes_nothing(losses, initial, shift):
    shifted = lr_sensitivity([x + shift for x in losses], initial + shift)
    assert shifted == pytest.approx(lr_sensitivity(losses, initial), abs=1e-9)


@given(curve, loss, st.randoms())
def test_the_order_of_learning_rates_does_not_matter(losses, initial, random):
    other = random.sample(losses, len(losses))
    assert lr_sensitivity(other, initial) == lr_sensitivity(losses, initial)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, None])
@given(losses=curve, initial=loss)
def test_a_run_that_is_not_finite_counts_as_untrained(bad, losses, initial):
    assert lr_sensitivity([*losses, bad], initial) == lr_sensitivity([*losses, initial], initial)


@given(curve, loss)
def test_no_loss_counts_for_more_than_the_untrained_one(losses, initial):
    best = min(min(losses), initial)
    assert 0.0 <= lr_sensitivity(losses, initial) <= initial - best + 1e-12


def test_the_initial_loss_must_be_finite_and_the_set_not_empty():
    with pytest.raises(ValueError, match="initialisation"):
        lr_sensitivity([1.0], math.nan)
    with pytest.raises(ValueError, match="at least one"):
        lr_sensitivity([], 1.0)


def test_the_least_sensitivity_over_shifted_sets_is_taken():
    rates = (1e-4, *PAPER_LEARNING_RATES)
    found = dict(zip(rates, (2.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0, 5.0), strict=True))
    assert lr_sensitivity_over_sets(found, (rates[1:], rates[:-1]), 6.0) == 0.0
    assert lr_sensitivity_over_sets(found, (rates[1:],), 6.0) == pytest.approx(3.0 / 7)
    with pytest.raises(KeyError, match=r"0\.5"):
        lr_sensitivity_over_sets(found, ((0.5,),), 6.0)


def test_highest_stable_rate_is_the_largest_below_both_bounds():
    found = {1e-3: 2.4, 1e-2: 2.0, 1e-1: 2.9, 3e-1: 3.1, 1.0: None}
    assert highest_stable_lr(found, 5.5) == 1e-1
    assert highest_stable_lr(found, 2.2) == 1e-2  # the loss at initialisation binds
    assert highest_stable_lr({0.1: None, 0.2: math.nan}, 5.5) is None
    assert best_lr(found, 5.5) == 1e-2
