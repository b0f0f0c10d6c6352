from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from resilin.config import SettingsError, parse_settings
from resilin.optim.adamw import AdamW
from resilin.optim.schedule import (
    Constant,
    Cosine,
    CosineThenLinear,
    InverseSqrt,
    Linear,
    Schedule,
    WarmupStableDecay,
    count_steps,
)

ALL = [Constant, Cosine, CosineThenLinear, Linear, InverseSqrt, WarmupStableDecay]
DECAYING = [Cosine, Linear, WarmupStableDecay]


def values(schedule: Schedule, total: int, peak: float = 1.0) -> list[float]:
    return [schedule.factor(step, total, peak) for step in range(total)]


@given(
    cls=st.sampled_from(ALL),
    total=st.integers(1, 300),
    warmup=st.one_of(st.integers(0, 400), st.floats(0, 1)),
    ratio=st.floats(0, 1),
    shape=st.sampled_from(["linear", "cosine", "sqrt"]),
)
def test_every_factor_lies_between_zero_and_one_and_never_rises_after_warm_up(
    cls: type[Schedule], total: int, warmup: Any, ratio: float, shape: str
) -> None:
    extra: dict[str, Any] = {"decay_shape": shape} if cls is WarmupStableDecay else {}
    schedule = cls(warmup=warmup, min_ratio=ratio, **extra)
    factors = values(schedule, total)
    assert all(0 <= f <= 1 for f in factors)
    after = factors[max(count_steps(warmup, total) - 1, 0) :]
    assert all(a >= b - 1e-12 for a, b in pairwise(after))


@given(cls=st.sampled_from(ALL), total=st.integers(2, 200), data=st.data())
def test_warm_up_rises_in_equal_steps_and_reaches_the_peak_at_its_last_step(
    cls: type[Schedule], total: int, data: st.DataObject
) -> None:
    warmup = data.draw(st.integers(1, total - 1))
    factors = values(cls(warmup=warmup), total)
    assert factors[:warmup] == [(t + 1) / warmup for t in range(warmup)]
    assert factors[warmup] == pytest.approx(1.0)  # decay starts from the peak


@given(cls=st.sampled_from(DECAYING), total=st.integers(3, 200), ratio=st.floats(0, 1), late=st.integers(0, 1000))
def test_decay_ends_at_the_minimum_and_stays_there(cls: type[Schedule], total: int, ratio: float, late: int) -> None:
    assert cls(warmup=0, min_ratio=ratio).factor(total + late, total) == pytest.approx(ratio, abs=1e-15)


@given(cls=st.sampled_from(DECAYING), peak=st.floats(1e-4, 1.0))
def test_an_absolute_minimum_holds_for_every_peak(cls: type[Schedule], peak: float) -> None:
    schedule = cls(warmup=10, min_lr=1e-5)
    assert peak * schedule.factor(100, 100, peak) == pytest.approx(1e-5)
    assert peak * schedule.factor(10, 100, peak) == pytest.approx(peak)


def test_a_warm_up_given_as_a_fraction_is_that_fraction_of_the_run() -> None:
    assert values(Cosine(warmup=0.1), 200) == values(Cosine(warmup=20), 200)
    # 1 is a step, 1.0 is the whole run: what TOML tells apart stays apart
    one, whole = (parse_settings(Linear, {"warmup": w}, "x") for w in (1, 1.0))
    assert one.factor(1, 100) == 1.0
    assert whole.factor(1, 100) == 0.02


def test_cosine_is_that_of_transformers_after_warm_up() -> None:
    transformers = pytest.importorskip("transformers")
    import torch

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    reference = transformers.get_cosine_schedule_with_warmup(optimizer, 20, 100).lr_lambdas[0]
    schedule = Cosine(warmup=20)
    assert [schedule.factor(t, 100) for t in range(20, 100)] == pytest.approx([reference(t) for t in range(20, 100)])


def test_midpoints_are_those_of_the_formulas() -> None:
    assert Linear(warmup=0, min_ratio=0.2).factor(50, 100) == pytest.approx(0.6)
    assert Cosine(warmup=0, min_ratio=0.2).factor(50, 100) == pytest.approx(0.6)
    assert Cosine(warmup=0).factor(25, 100) == pytest.approx((1 + math.sqrt(0.5)) / 2)
    assert InverseSqrt(warmup=25).factor(100, 1000) == pytest.approx(0.5)
    assert InverseSqrt(warmup=25, min_ratio=0.7).factor(100, 1000) == 0.7
    assert Constant(warmup=0).factor(99, 100) == 1.0


@pytest.mark.parametrize(("shape", "middle"), [("linear", 0.5), ("cosine", 0.5), ("sqrt", 1 - math.sqrt(0.5))])
def test_warm_up_stable_decay_holds_the_peak_then_falls_in_its_shape(shape: Any, middle: float) -> None:
    schedule = WarmupStableDecay(warmup=10, decay=0.2, decay_shape=shape)
    factors = values(schedule, 100)
    assert factors[9:81] == [1.0] * 72
    assert factors[81] < 1.0
    assert factors[90] == pytest.approx(middle)
    assert schedule.factor(100, 100) == pytest.approx(0.0)


@given(total=st.integers(100, 500), longer=st.integers(0, 500))
def test_a_run_can_be_prolonged_from_any_point_of_the_plateau(total: int, longer: int) -> None:
    schedule = WarmupStableDecay(warmup=10, decay=30)
    assert values(schedule, total)[: total - 30] == values(schedule, total + longer)[: total - 30]


def test_a_decay_longer_than_what_warm_up_leaves_starts_right_after_it() -> None:
    schedule = WarmupStableDecay(warmup=50, decay=80, decay_shape="linear")
    assert schedule.factor(49, 100) == 1.0
    assert schedule.factor(75, 100) == pytest.approx(0.5)


def test_a_cosine_can_end_in_a_line_to_zero_as_in_the_command_for_gpt2() -> None:
    schedule, peak = CosineThenLinear(warmup=2000, min_lr=2e-5, cooldown=2000), 2e-4
    rates = {step: peak * schedule.factor(step, 40_000, peak) for step in (1999, 20_000, 38_000, 39_000, 40_000)}
    assert rates[1999] == pytest.approx(2e-4)
    assert rates[20_000] == pytest.approx((2e-4 + 2e-5) / 2)
    assert rates[38_000] == pytest.approx(2e-5)
    assert rates[39_000] == pytest.approx(1e-5)
    assert rates[40_000] == pytest.approx(0.0)
    assert values(CosineThenLinear(warmup=3, min_ratio=0.1, cooldown=0), 50) == values(
        Cosine(warmup=3, min_ratio=0.1), 50
    )


@pytest.mark.parametrize(
    ("tree", "words"),
    [
        ({"schedule": {"min_lr": 1e-5, "min_ratio": 0.1}}, "give one of them"),
        ({"lr": 1e-6, "schedule": {"min_lr": 1e-5}}, "above the peak"),
        ({"schedule": {"warmup": -1}}, "schedule.warmup = -1: should be a number of steps"),
        ({"schedule": {"warmup": 200.0}}, "schedule.warmup = 200.0: a fraction.*without a point: 200"),
        ({"schedule": {"warm": 3}}, "did you mean 'warmup'"),
        ({"schedule": {"use": "resilin.optim.schedule:Cosinus"}}, "offers: .*Cosine"),
    ],
)
def test_settings_that_make_no_sense_are_refused_when_they_load(tree: dict[str, Any], words: str) -> None:
    with pytest.raises(SettingsError, match=words):
        parse_settings(AdamW, tree, "x.toml")
