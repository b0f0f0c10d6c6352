"""Which rho is used, and that it says where it comes from."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from resilin.models.decoder_settings import DecoderSettings
from resilin.planner.budget import FlopBudget, TokenBudget
from resilin.planner.family import Family
from resilin.planner.pilots import plan_pilots
from resilin.planner.rho import Pilot, choose_rho, fit_rho


def pilots_of(best: float, ratios: tuple[float, ...] = (2.0, 10.0, 50.0), bend: float = 0.1) -> list[Pilot]:
    """Runs of equal P T whose losses are a parabola in log(T / P) around `best`."""
    return [
        Pilot(math.sqrt(1e12 / r), r * math.sqrt(1e12 / r), 3 + bend * math.log(r / best) ** 2, cost=1e12)
        for r in ratios
    ]


@given(st.floats(2.1, 49), st.floats(0.01, 1))
def test_the_fitted_rho_is_the_bottom_of_the_valley(best: float, bend: float) -> None:
    assert fit_rho(pilots_of(best, bend=bend)) == pytest.approx(best, rel=1e-6)


def test_a_valley_outside_the_measured_ratios_or_no_valley_is_no_measurement() -> None:
    assert fit_rho(pilots_of(500)) is None
    assert fit_rho(pilots_of(10, bend=-0.1)) is None


def test_auto_is_measured_where_pilots_ran_else_five_or_twenty_and_says_which() -> None:
    measured = choose_rho("auto", "practical", pilots_of(7))
    assert measured.value == pytest.approx(7, rel=1e-6)
    assert "fitted to 3 pilot runs" in measured.source
    practical, faithful = choose_rho("auto"), choose_rho("auto", "faithful")
    assert (practical.value, faithful.value) == (20, 5)
    assert "practical" in practical.source
    assert "faithful" in faithful.source
    fallen_back = choose_rho("auto", "faithful", pilots_of(500))
    assert fallen_back.value == 5
    assert "no valley" in fallen_back.source
    given_one = choose_rho(7.5, "faithful", pilots_of(3))
    assert (given_one.value, given_one.source) == (7.5, "as given")


def test_pilots_that_cannot_be_compared_are_refused() -> None:
    with pytest.raises(ValueError, match="at least three runs"):
        fit_rho(pilots_of(7)[:2])
    unequal = [*pilots_of(7)[:2], Pilot(1e6, 5e7, 3.0, cost=5e13)]
    with pytest.raises(ValueError, match="equal cost"):
        fit_rho(unequal)
    with pytest.raises(ValueError, match="positive number such as 5 or 20"):
        choose_rho(-1.0)


def test_pilots_spend_two_percent_on_three_sizes_or_do_not_run() -> None:
    family = Family(DecoderSettings(vocab_size=256, hidden_size=768, layers=12, heads=12))
    plans = plan_pilots(FlopBudget(1e19), family, 2**14)
    assert len({member.parameters for member, _ in plans}) == 3
    spent = sum(6 * member.parameters * steps * 2**14 for member, steps in plans)
    assert spent == pytest.approx(0.02 * 1e19, rel=0.01)
    assert plan_pilots(FlopBudget(1e15), family, 2**20) == []
    assert plan_pilots(TokenBudget(1e10), family, 2**14) == []
