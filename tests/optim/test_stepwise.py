"""The stepwise schedule falls at its boundaries and nowhere else."""

from __future__ import annotations

import pytest

from resilin.config import SettingsError, parse_settings
from resilin.optim.stepwise import Stepwise


def test_it_falls_at_each_boundary() -> None:
    schedule = Stepwise(boundaries=(30, 60), warmup=0)
    factors = [schedule.factor(step, 100) for step in range(100)]
    assert factors == pytest.approx([1.0] * 30 + [0.1] * 30 + [0.01] * 40)
    fractions = Stepwise(boundaries=(0.3, 0.6), warmup=0)
    assert [fractions.factor(step, 100) for step in range(100)] == factors


def test_warm_up_leads_to_where_it_ends() -> None:
    schedule = Stepwise(boundaries=(5,), warmup=10, gamma=0.5)
    assert schedule.factor(9, 100) == pytest.approx(0.5)
    assert schedule.factor(0, 100) == pytest.approx(0.05)
    assert Stepwise(boundaries=(50,), warmup=10).factor(4, 100) == pytest.approx(0.5)


def test_it_never_falls_below_its_minimum() -> None:
    schedule = Stepwise(boundaries=(10, 20, 30), warmup=0, min_ratio=0.05)
    assert [schedule.factor(step, 40) for step in (15, 25, 35)] == pytest.approx([0.1, 0.05, 0.05])


def test_boundaries_that_cannot_be_are_refused() -> None:
    for boundaries, message in (([30, 20], "should increase"), ([0.5, 60], "not both")):
        with pytest.raises(SettingsError, match=message):
            parse_settings(Stepwise, {"boundaries": boundaries}, "test")
