"""The grid schedule is the published construction: boundaries, multipliers, equal iterations, constant cost."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from resilin.multigrid.schedule import LONG_FACTORS, GridSchedule, Plan, ScheduleError, default_long_factors
from resilin.vision.grid import Grid

KINETICS = Plan(Grid(32, 224), 239, (94, 154, 196), 235.0, long_factors=LONG_FACTORS)


def test_the_boundaries_of_the_official_kinetics_run() -> None:
    schedule = GridSchedule(KINETICS)
    ends = [segment.epochs[1] for segment in schedule.segments]
    assert ends == [73, 110, 142, 158, 205, 228, 248, 259, 291, 308, 322, 329, 358]
    assert schedule.epochs == round(1.5 * 239)
    assert schedule.plain_steps / schedule.total == pytest.approx(3.4, abs=0.05)


def test_shapes_and_multipliers_of_the_paper() -> None:
    segments = GridSchedule(KINETICS).segments
    bases = [(s.base.grid.frames, s.base.grid.size, s.base.multiplier) for s in segments[:4]]
    assert bases == [(8, 158, 8), (16, 158, 4), (16, 224, 2), (32, 224, 1)]
    assert [s.stage for s in segments] == [0] * 4 + [1] * 4 + [2] * 4 + [3]
    assert segments[-1].base.grid == Grid(32, 224)
    coarse = [(p.grid.size, p.multiplier) for p in segments[0].phases]
    assert coarse == [(112, 16), (158, 8), (158, 8)], "beside a base of 158 the short cycle gives 2, 1, 1"
    fine = [(p.grid.size, p.multiplier) for p in segments[-1].phases]
    assert fine == [(112, 4), (158, 2), (224, 1)]


def test_every_shape_of_a_stage_has_as_many_iterations() -> None:
    segments = GridSchedule(KINETICS).segments
    for stage in range(3):
        mine = [s for s in segments if s.stage == stage]
        steps = [s.steps[1] - s.steps[0] for s in mine]
        # Both ends of a shape are rounded to whole epochs, of which the finest shape has the most steps.
        assert max(steps) - min(steps) <= 2 * 235.0 / min(s.average for s in mine)


def test_without_rounding_to_long_epochs_iterations_are_equal() -> None:
    fine = GridSchedule(replace(KINETICS, epochs=239_000, stages=(94_000, 154_000, 196_000), steps_per_epoch=0.235))
    for stage in range(3):
        steps = [s.steps[1] - s.steps[0] for s in fine.segments if s.stage == stage]
        assert max(steps) - min(steps) <= 2


plans = st.builds(
    lambda t, s, epochs, cuts, long, short, per: Plan(
        Grid(t, s),
        epochs,
        tuple(sorted({max(1, round(c * epochs)) for c in cuts if 1 <= round(c * epochs) < epochs})) or (epochs // 2,),
        per,
        long_cycle=long or not short,
        short_cycle=short,
        long_factors=default_long_factors(Grid(t, s)),
    ),
    st.sampled_from([0, 8, 16, 32]),
    st.sampled_from([32, 64, 112, 224]),
    st.integers(200, 400),
    st.lists(st.floats(0.3, 0.9), min_size=1, max_size=2),
    st.booleans(),
    st.booleans(),
    st.sampled_from([7.0, 12.5, 100.0]),
)


@given(plan=plans)
def test_cost_stays_and_epochs_add_up(plan: Plan) -> None:
    try:
        schedule = GridSchedule(plan)
    except ScheduleError:
        return  # stages one epoch apart
    assert abs(schedule.epochs - plan.epoch_factor * plan.epochs) <= 0.5 + 1e-6
    for segment in schedule.segments:
        for phase in segment.phases:
            share = phase.multiplier * phase.grid.cost / plan.full.cost
            assert abs(share - 1) <= 0.5 / phase.multiplier + 2.5 / phase.grid.size
    ends = [s.steps for s in schedule.segments]
    assert ends[0][0] == 0
    assert all(a[1] == b[0] for a, b in itertools.pairwise(ends))


@given(plan=plans, at=st.floats(0, 1))
def test_samples_before_a_step_are_the_sum_of_all_batches(plan: Plan, at: float) -> None:
    plan = replace(plan, steps_per_epoch=2.0)
    try:
        schedule = GridSchedule(plan)
    except ScheduleError:
        return
    step = int(at * schedule.total)
    assert schedule.samples_before(step) == sum(schedule.phase(i).multiplier for i in range(step))
    costs = [schedule.phase(i).multiplier * schedule.phase(i).grid.cost for i in range(schedule.total)]
    assert schedule.cost == sum(costs)


def test_the_short_cycle_takes_turns_over_boundaries() -> None:
    schedule = GridSchedule(KINETICS)
    for step in (0, 1, 2, 3, schedule.segments[2].steps[0] + 5):
        assert schedule.phase(step) == schedule.segment(step).phases[step % 3]


def test_long_cycle_alone_fine_tunes_at_the_default_shape() -> None:
    schedule = GridSchedule(replace(KINETICS, short_cycle=False))
    assert all(len(s.phases) == 1 for s in schedule.segments)
    assert schedule.segments[-1].phases[0].multiplier == 1
    assert schedule.epochs == 358


def test_short_cycle_alone_stretches_the_stages() -> None:
    schedule = GridSchedule(replace(KINETICS, long_cycle=False))
    assert [s.epochs[1] for s in schedule.segments] == [round(1.5 * e) for e in (94, 154, 196, 239)]
    assert {s.base.grid for s in schedule.segments} == {Grid(32, 224)}
    assert {s.base.multiplier for s in schedule.segments} == {1}


def test_fine_tuning_without_the_short_cycle() -> None:
    schedule = GridSchedule(replace(KINETICS, finetune_short_cycle=False))
    assert [len(s.phases) for s in schedule.segments] == [3] * 12 + [1]


def test_one_factor_and_no_short_cycle_is_the_plain_run() -> None:
    schedule = GridSchedule(
        replace(KINETICS, long_factors=((1.0, 1.0),), short_cycle=False, epoch_factor=1.0, steps_per_epoch=10.0)
    )
    assert [s.steps for s in schedule.segments] == [(0, 940), (940, 1540), (1540, 1960), (1960, 2390)]
    assert {s.base.multiplier for s in schedule.segments} == {1}
    assert schedule.cost == schedule.plain_cost


def test_evaluations_are_counted_back_from_the_end_of_each_shape() -> None:
    schedule = GridSchedule(replace(KINETICS, steps_per_epoch=1.0 * 2**10))
    first = schedule.segments[0]
    steps, length = first.steps[1], first.epochs[1]
    period = length // 3 + 1
    wanted = {round(epoch * steps / length) for epoch in (length, length - period, length - 2 * period)}
    assert {m for m in schedule.milestones if m <= steps} == wanted
    assert all(segment.steps[1] in schedule.milestones for segment in schedule.segments)
    ends = GridSchedule(replace(KINETICS, evaluations=0)).milestones
    assert ends == {s.steps[1] for s in GridSchedule(KINETICS).segments}


@pytest.mark.parametrize(("full", "shapes"), [
    (Grid(0, 32), [(0, 23, 2), (0, 32, 1)]),
    (Grid(64, 0), [(16, 0, 4), (32, 0, 2), (64, 0, 1)]),
])  # fmt: skip
def test_images_and_sequences_have_the_axes_they_have(full: Grid, shapes: list[tuple[int, int, int]]) -> None:
    schedule = GridSchedule(Plan(full, 300, (150, 240), 10.0, long_factors=default_long_factors(full)))
    found = [(s.base.grid.frames, s.base.grid.size, s.base.multiplier) for s in schedule.segments if s.stage == 0]
    assert found == shapes
    assert schedule.total < schedule.plain_steps
    lengths = [p.grid.frames or p.grid.size for p in schedule.segments[-1].phases]
    whole = full.frames or full.size
    assert lengths == [whole // 2, round(whole * math.sqrt(0.5)), whole]


def test_sizes_are_multiples_of_a_patch_where_that_is_asked_for() -> None:
    full = Grid(0, 224)
    plan = Plan(full, 300, (150, 240), 10.0, long_factors=default_long_factors(full), multiple=16)
    schedule = GridSchedule(plan)
    sizes = {p.grid.size for s in schedule.segments for p in s.phases}
    assert sizes == {112, 160, 224}
    assert {p.multiplier for s in schedule.segments for p in s.phases} == {4, 2, 1}
    tokens = Grid(100, 0)
    plan = Plan(tokens, 300, (150, 240), 10.0, long_factors=default_long_factors(tokens), multiple=20)
    assert {p.grid.frames for s in GridSchedule(plan).segments for p in s.phases} == {20, 40, 80, 100}


@pytest.mark.parametrize(("changes", "message"), [
    ({"stages": ()}, "name at least one epoch"),
    ({"stages": (94, 239)}, "end before epochs"),
    ({"stages": (94, 94)}, "should increase"),
    ({"short_factors": (0.0,)}, "short_factors"),
    ({"long_factors": ((0.01, 1.0),)}, "leaves nothing"),
    ({"epochs": 8, "stages": (2, 4, 6)}, "gets no epoch"),
    ({"steps_per_epoch": 0.001}, "gets no step"),
    ({"multiple": 48}, "does not divide the default size"),
    ({"full": Grid()}, "neither frames nor a size"),
])  # fmt: skip
def test_impossible_schedules_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ScheduleError, match=message):
        GridSchedule(replace(KINETICS, **changes))  # type: ignore[arg-type]
