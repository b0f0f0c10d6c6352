"""The plan: an exact identity before rounding, a small error after it, a fixed point, and honest warnings."""

from __future__ import annotations

import math

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from resilin.models.decoder_settings import DecoderSettings
from resilin.planner.budget import FlopBudget, StepTimes, TimeBudget, TokenBudget, adjust
from resilin.planner.family import Family
from resilin.planner.one_epoch import Plan, adjust_plan, make_plan
from resilin.planner.power_law import PowerLaw
from resilin.planner.rho import Rho
from resilin.planner.rows import Data, predict

FAMILY = Family(DecoderSettings(vocab_size=32000, hidden_size=768, layers=12, heads=12))
RHO = Rho(20.0, "test")
FLOPS = st.floats(1e15, 1e24)
RHOS = st.floats(0.5, 200)


def plan(flops: float = 1e19, rho: float = 20.0, batch: int = 2**16, available: float | None = None) -> Plan:
    return make_plan(FlopBudget(flops), FAMILY, Rho(rho, "test"), batch, Data(available))


@given(st.floats(1e6, 1e27), RHOS)
def test_before_rounding_6pt_is_the_budget_and_t_over_p_is_rho(flops: float, rho: float) -> None:
    split = FlopBudget(flops).split(rho)
    assert 6 * split.parameters * split.tokens == pytest.approx(flops, rel=1e-12)
    assert split.ratio == pytest.approx(rho, rel=1e-12)


@given(FLOPS, RHOS)
def test_after_rounding_the_budget_is_missed_by_less_than_a_twentieth(flops: float, rho: float) -> None:
    made = plan(flops, rho, batch=2**14)
    chosen = made.chosen
    assume(chosen.steps >= 10)
    assert 6 * chosen.architecture.parameters * chosen.tokens == pytest.approx(flops, rel=0.05)
    assert chosen.tokens == chosen.steps * 2**14
    assert chosen.spent == pytest.approx(6 * chosen.architecture.parameters * chosen.tokens)


@given(FLOPS, RHOS)
def test_with_enough_data_the_nearest_architecture_is_chosen(flops: float, rho: float) -> None:
    made = plan(flops, rho, batch=2**10)
    assume(made.chosen.steps >= 1000)
    near = FAMILY.nearest(made.ideal.parameters)
    chosen = made.chosen.architecture

    def distance(parameters: float) -> float:
        return abs(math.log(parameters / made.ideal.parameters))

    # Whole steps may decide between two that are equally near.
    assert distance(chosen.parameters) <= distance(near.parameters) + 2e-3


@given(st.floats(1e5, 1e12), st.floats(1e6, 1e14), RHOS)
def test_an_adjusted_plan_costs_the_same_and_adjusting_again_changes_nothing(p: float, t: float, rho: float) -> None:
    once = adjust(p, t, rho)
    assert once.parameters * once.tokens == pytest.approx(p * t, rel=1e-12)
    assert once.ratio == pytest.approx(rho, rel=1e-12)
    twice = adjust(once.parameters, once.tokens, rho)
    assert twice.parameters == pytest.approx(once.parameters, rel=1e-12)
    assert twice.tokens == pytest.approx(once.tokens, rel=1e-12)


@given(st.floats(1e5, 1e12), st.floats(1e6, 1e14), RHOS)
def test_a_model_too_large_for_its_data_shrinks_and_runs_longer(p: float, t: float, rho: float) -> None:
    assume(abs(math.log(t / p / rho)) > 1e-9)
    made = adjust(p, t, rho)
    too_large = t / p < rho
    assert (made.parameters < p) == too_large
    assert (made.tokens > t) == too_large


@given(FLOPS, RHOS, st.integers(8, 22), st.none() | st.floats(1e6, 1e14))
def test_the_planner_applied_to_its_own_output_changes_nothing(
    flops: float, rho: float, log_batch: int, available: float | None
) -> None:
    batch = 2**log_batch
    first = plan(flops, rho, batch, available)
    assume(first.one_epoch and first.chosen.steps >= 2)
    second = adjust_plan(first.chosen.architecture, first.chosen.steps, FAMILY, first.rho, batch, first.data)
    assert second.chosen.architecture == first.chosen.architecture
    assert second.chosen.steps == first.chosen.steps


def test_enough_data_gives_one_epoch_without_warnings_and_without_dropout() -> None:
    made = plan(1e19, available=1e12)
    assert made.one_epoch
    assert made.warnings == ()
    assert made.dropout == 0
    assert "model.dropout=0" in made.settings()
    assert f"train.steps={made.chosen.steps}" in made.settings()
    assert f"model.layers={made.chosen.architecture.settings.layers}" in made.settings()


def test_too_few_tokens_for_any_row_repeat_them_and_say_so_with_the_cost_and_what_to_ask_for() -> None:
    made = make_plan(TokenBudget(1e9), FAMILY, RHO, 2**16, Data(1e8))
    assert not made.one_epoch
    assert made.chosen.epochs == pytest.approx(10, rel=1e-3)
    text = " ".join(made.warnings)
    for part in ("10 epochs", "get 900M more tokens", "% of the budget is lost", "data, not compute, is the limit"):
        assert part in text
    assert "repeats" in made.chosen.flags


def test_the_row_with_the_fewest_epochs_is_taken_when_all_repeat() -> None:
    made = plan(1e21, available=1e6)
    assert not made.one_epoch
    assert made.chosen.epochs == min(row.epochs for row in made.rows)


@given(FLOPS, RHOS, st.floats(1e7, 1e13))
def test_a_row_that_repeats_is_never_chosen_while_another_does_not(flops: float, rho: float, available: float) -> None:
    made = plan(flops, rho, 2**12, available)
    fresh = [row for row in made.rows if row.epochs <= 1]
    assert made.one_epoch == bool(fresh)
    if fresh:
        distance = abs(math.log(made.chosen.ratio / rho))
        assert distance == min(abs(math.log(row.ratio / rho)) for row in fresh)


@given(FLOPS, RHOS, st.floats(1e7, 1e13))
def test_flags_say_exactly_what_their_definitions_say(flops: float, rho: float, available: float) -> None:
    for row in plan(flops, rho, 2**12, available).rows:
        assert ("over-sized" in row.flags) == (row.ratio < rho / 4)
        assert ("under-sized" in row.flags) == (row.ratio > 4 * rho)
        assert ("repeats" in row.flags) == (row.tokens > available)
        assert ("needs more data" in row.flags) == (rho * row.architecture.parameters > available)


def test_dropout_stays_only_where_the_user_insists_and_then_says_what_it_costs() -> None:
    made = make_plan(FlopBudget(1e19), FAMILY, RHO, 2**16, dropout=0.1)
    assert made.dropout == 0.1
    assert any("dropout 0.1 is kept as insisted on" in warning for warning in made.warnings)


def test_a_batch_too_large_for_the_budget_is_told_with_one_that_fits() -> None:
    made = plan(1e16, batch=2**25)
    assert any(
        "whole steps miss the budget" in warning and "use a batch of at most" in warning for warning in made.warnings
    )


def test_hidden_epochs_of_a_corpus_with_duplicates_are_not_data() -> None:
    whole, half = Data(1e9), Data(1e9, duplicate_rate=0.5)
    assert half.unique == whole.unique / 2
    made = make_plan(TokenBudget(8e8), FAMILY, RHO, 2**16, half)
    assert made.chosen.epochs == pytest.approx(1.6, rel=1e-3)
    assert any("50.0% of the corpus repeats" in warning for warning in made.warnings)
    with pytest.raises(ValueError, match="share of the corpus in"):
        _ = Data(1e9, 1.0).unique


def test_losses_are_predicted_where_laws_were_fitted_and_repeats_count_for_less() -> None:
    members = FAMILY.members[1:4]
    laws = {float(member.parameters): PowerLaw(20.0 - i, 0.1) for i, member in enumerate(members)}
    budget = TokenBudget(1e9)
    fresh = make_plan(budget, FAMILY, RHO, 2**16, laws=laws)
    short = make_plan(budget, FAMILY, RHO, 2**16, Data(1e8), laws=laws)
    by_size = {row.architecture.parameters: row.predicted_loss for row in fresh.rows}
    repeated = {row.architecture.parameters: row.predicted_loss for row in short.rows}
    for size, law in laws.items():
        if int(size) in by_size:
            assert by_size[int(size)] == pytest.approx(law.loss(1e9), rel=1e-4)
            assert repeated[int(size)] > by_size[int(size)]
    assert predict(laws, FAMILY.members[8].parameters, 1e9) is None
    assert predict(laws, math.sqrt(members[0].parameters * members[1].parameters), 1e9) == pytest.approx(
        math.sqrt(laws[members[0].parameters].loss(1e9) * laws[members[1].parameters].loss(1e9))
    )


@given(st.floats(1e-12, 1e-4), st.floats(0.3, 1.5), st.floats(10, 1e7), RHOS)
def test_bisection_solves_a_power_law_of_step_times_exactly(c: float, e: float, seconds: float, rho: float) -> None:
    batch = 2**15
    budget = TimeBudget(seconds, lambda p: c * p**e, batch)
    exact = (seconds * batch / (c * rho)) ** (1 / (e + 1))
    assume(10 < exact < 1e14)
    split = budget.split(rho)
    assert split.parameters == pytest.approx(exact, rel=1e-12)
    assert budget.per_token(split.parameters) * split.tokens == pytest.approx(seconds, rel=1e-12)


def test_measured_step_times_follow_a_power_law_exactly_between_and_beyond_them() -> None:
    times = StepTimes(tuple((p, 3e-9 * p**0.9) for p in (1e6, 7e6, 1e8)))
    for p in (1e4, 1e6, 3e6, 5e7, 1e8, 1e10):
        assert times(p) == pytest.approx(3e-9 * p**0.9, rel=1e-12)
    exact = (3600 * 4096 / (3e-9 * 20)) ** (1 / 1.9)
    assert TimeBudget(3600, times, 4096).split(20).parameters == pytest.approx(exact, rel=1e-12)


def test_a_plan_under_a_wall_clock_budget_spends_the_time() -> None:
    times = StepTimes(((3e6, 0.02), (3e7, 0.11), (3e8, 0.9)))
    made = make_plan(TimeBudget(36000, times, 2**15), FAMILY, RHO, 2**15)
    chosen = made.chosen
    assert chosen.step_seconds == pytest.approx(times(chosen.architecture.parameters))
    assert chosen.steps * chosen.step_seconds == pytest.approx(36000, rel=0.05)


@pytest.mark.parametrize("measured", [((1e6, 0.1),), ((2e6, 0.1), (1e6, 0.1)), ((1e6, 0.0), (2e6, 0.1))])
def test_step_times_that_make_no_sense_are_refused(measured: tuple[tuple[float, float], ...]) -> None:
    with pytest.raises(ValueError, match=r"two or more different sizes|positive"):
        StepTimes(measured)


@pytest.mark.parametrize("amount", [0.0, -1.0, math.inf, math.nan])
def test_a_budget_of_nothing_is_refused(amount: float) -> None:
    with pytest.raises(ValueError, match="positive and finite"):
        FlopBudget(amount)
