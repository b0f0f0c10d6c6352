"""The learning rate follows the long cycle's batch and the stages of the plain run."""

from __future__ import annotations

from dataclasses import replace

import pytest

from resilin.config import SettingsError
from resilin.multigrid.rate import GridRate
from resilin.multigrid.schedule import LONG_FACTORS, GridSchedule, Plan
from resilin.optim.schedule import Constant, Cosine
from resilin.optim.stepwise import Stepwise
from resilin.vision.grid import Grid

PLAN = Plan(Grid(32, 224), 239, (94, 154, 196), 40.0, long_factors=LONG_FACTORS)
STEPS = Stepwise(boundaries=(94 / 239, 154 / 239, 196 / 239), warmup=0)


def test_the_table_of_the_paper() -> None:
    grid = GridSchedule(PLAN)
    rate = GridRate(grid, STEPS, 0.1)
    middles = [rate((s.steps[0] + s.steps[1]) // 2 - 1) for s in grid.segments[:-1]]
    assert middles == pytest.approx([8, 4, 2, 1, 0.8, 0.4, 0.2, 0.1, 0.08, 0.04, 0.02, 0.01])


def test_the_fine_tuning_keeps_the_rate_for_half_of_its_steps() -> None:
    grid = GridSchedule(PLAN)
    rate = GridRate(grid, STEPS, 0.1)
    start, stop = grid.segments[-1].steps
    factors = [rate(step) for step in range(start, stop)]
    half = (stop - start) // 2
    assert factors[: half - 1] == pytest.approx([0.01] * (half - 1))
    assert factors[half + 1 :] == pytest.approx([0.001] * (stop - start - half - 1))


@pytest.mark.parametrize("schedule", [STEPS, Constant(warmup=0), Cosine(warmup=0)])
def test_rate_over_batch_is_constant_over_the_shapes_of_a_stage(schedule: object) -> None:
    grid = GridSchedule(PLAN)
    rate = GridRate(grid, schedule, 0.1)  # type: ignore[arg-type]
    for stage in range(3):
        segments = [s for s in grid.segments if s.stage == stage]
        over = [rate(s.steps[0]) / s.base.multiplier for s in segments]
        if isinstance(schedule, Cosine):
            assert over == sorted(over, reverse=True), "beneath the multiplier the cosine falls as ever"
        else:
            assert over == pytest.approx([over[0]] * 4)


def test_one_factor_and_no_short_cycle_is_plain_step_decay_but_for_the_last_stage() -> None:
    plan = replace(PLAN, long_factors=((1.0, 1.0),), short_cycle=False, epoch_factor=1.0)
    grid, plain = GridSchedule(plan), STEPS.model_copy(update={"warmup": 100})
    rate = GridRate(grid, plain, 0.1)
    start, stop = grid.segments[-1].steps
    for step in range(0, start, 7):
        assert rate(step) == pytest.approx(plain.factor(step, grid.total), rel=1e-12)
    assert rate(start) == pytest.approx(10 * plain.factor(start, grid.total))
    assert rate(stop - 1) == pytest.approx(plain.factor(stop - 1, grid.total))


def test_short_cycle_alone_does_not_scale_the_rate_and_splits_nothing() -> None:
    grid = GridSchedule(replace(PLAN, long_cycle=False))
    rate = GridRate(grid, STEPS, 0.1)
    assert [rate(s.steps[0]) for s in grid.segments] == pytest.approx([1, 0.1, 0.01, 0.001])


def test_a_cosine_is_read_at_the_same_part_of_the_same_stage() -> None:
    grid, cosine = GridSchedule(PLAN), Cosine(warmup=0)
    rate = GridRate(grid, cosine, 0.1)
    for stage, bound in enumerate((0, 94, 154, 196)):
        segment = next(s for s in grid.segments if s.stage == stage)
        wanted = cosine.factor(round(bound * 40), 239 * 40) * segment.base.multiplier
        assert rate(segment.steps[0]) == pytest.approx(wanted)
    assert rate(grid.total - 1) < 1e-3


def test_the_warm_up_leads_to_the_rate_at_its_end_in_as_many_epochs() -> None:
    grid = GridSchedule(PLAN)
    warm = STEPS.model_copy(update={"warmup": 34 * 40})
    rate = GridRate(grid, warm, 0.1)
    length = round(34 * 40 / grid.segments[0].average)
    assert rate.warmup == length
    assert rate(length - 1) == pytest.approx(8)
    assert rate(length) == pytest.approx(8)
    assert rate(0) == pytest.approx(8 / length)
    assert [rate(s) / (s + 1) for s in range(length)] == pytest.approx([8 / length] * length)


def test_a_warm_up_beyond_the_first_shape_is_refused() -> None:
    with pytest.raises(SettingsError, match=r"the first shape has .* shorten schedule\.warmup"):
        GridRate(GridSchedule(PLAN), STEPS.model_copy(update={"warmup": 90 * 40}), 0.1)


def test_boundaries_that_are_not_those_of_the_source_are_refused() -> None:
    with pytest.raises(SettingsError, match="should be the same"):
        GridRate(GridSchedule(PLAN), Stepwise(boundaries=(0.3, 0.6, 0.8), warmup=0), 0.1)
    with pytest.raises(SettingsError, match="should be the same"):
        GridRate(GridSchedule(PLAN), Stepwise(boundaries=(0.5,), warmup=0), 0.1)


def test_other_scalings() -> None:
    grid = GridSchedule(PLAN)
    assert GridRate(grid, STEPS, 0.1, "sqrt")(0) == pytest.approx(8**0.5)
    assert GridRate(grid, STEPS, 0.1, "none")(0) == 1.0
