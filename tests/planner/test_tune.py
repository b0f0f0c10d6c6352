"""Tuning by trials: exact contributions, studies that go on, failures that count, layouts that can be."""

from __future__ import annotations

import json
import random
from pathlib import Path
from statistics import mean

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from resilin.config import UserError
from resilin.planner.cost import Arrangement
from resilin.planner.search.request import LayoutRequest, prepare
from resilin.planner.tune import importance, shapley, tune
from resilin.planner.tune.features import choices, numbers, values
from resilin.planner.tune.request import priced, simulated
from resilin.planner.tune.sensitivity import sensitivity
from resilin.planner.tune.study import Outcome, Trial
from resilin.planner.tune.trial_run import run_trial

ASKED = prepare(LayoutRequest("dgx-a100-40", 16, None, "gpt-6.7b", ("train.batch_size=64",)))
PLANS = [step.plan for step in priced(ASKED)]


# -- contributions -----------------------------------------------------------------------------------------------


@settings(max_examples=20, deadline=None)
@given(st.lists(st.floats(-3, 3), min_size=3, max_size=3), st.integers(0, 100))
def test_contributions_of_a_linear_function_are_its_terms(slopes: list[float], seed: int) -> None:
    rows = np.random.default_rng(seed).normal(size=(6, 3))
    found = shapley(lambda x_NF: x_NF @ np.array(slopes), rows[0], rows)
    assert found == pytest.approx(np.array(slopes) * (rows[0] - rows.mean(axis=0)), abs=1e-9)


def test_contributions_add_up_are_symmetric_and_leave_out_what_does_nothing() -> None:
    def function(x_NF: np.ndarray) -> np.ndarray:
        return np.asarray(x_NF[:, 0] * x_NF[:, 1] + np.maximum(x_NF[:, 0] + x_NF[:, 1], 0))

    rows = np.random.default_rng(0).normal(size=(8, 3))
    rows[:, 1] = rows[:, 0]
    found = shapley(function, rows[2], rows)
    assert found.sum() == pytest.approx(float(function(rows[2:3])[0] - function(rows).mean()))
    assert found[0] == pytest.approx(found[1])
    assert found[2] == 0
    assert importance(function, rows)[2] == 0
    with pytest.raises(ValueError, match="11 features"):
        shapley(function, np.zeros(11), np.zeros((2, 11)))


# -- layouts as choices ------------------------------------------------------------------------------------------


def test_layouts_differ_in_their_choices() -> None:
    found = [json.dumps(choices(plan)) for plan in PLANS]
    assert len(set(found)) == len(found)
    known = values(PLANS)
    assert "context" not in known
    rows = {tuple(numbers(plan, known)) for plan in PLANS}
    assert len(rows) == len(PLANS)


# -- studies -----------------------------------------------------------------------------------------------------


def steady(plan: Arrangement) -> Outcome:
    return simulated(ASKED, 0)(plan)


def test_a_study_of_few_layouts_ends_with_all_of_them_and_the_true_best() -> None:
    few = random.Random(1).sample(PLANS, 5)
    study = tune(few, steady, 50, first=2, drawn=3)
    assert sorted(trial.layout for trial in study.trials) == sorted(map(str, few))
    rates = {str(plan): steady(plan).rate for plan in few}
    best = max(rates.values())
    assert study.best is None if best == 0 else (study.best is not None and study.best.outcome.rate == best)


def test_a_failed_trial_is_never_the_best() -> None:
    study = tune(PLANS[:4], lambda plan: Outcome("oom", reason="too large"), 4, first=4)
    assert study.best is None
    assert [trial.outcome.status for trial in study.trials] == ["oom"] * 4


def test_an_interrupted_study_goes_on_as_if_it_had_not_been(tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    whole = tune(PLANS, steady, 9, seed=3)
    file = tmp_path / "trials.jsonl"
    tune(PLANS, steady, 5, seed=3, file=file)
    rest: list[Trial] = []
    study = tune(PLANS, steady, 9, seed=3, file=file, tell=rest.append)
    assert study.trials == whole.trials
    assert len(rest) == 4
    assert len({trial.layout for trial in study.trials}) == 9


def test_trials_of_another_study_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "trials.jsonl"
    tune(PLANS[:3], steady, 1, file=file)
    with pytest.raises(UserError, match="use another folder"):
        tune(PLANS[5:], steady, 1, file=file)


def test_without_optuna_the_first_trials_run_and_the_rest_say_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "optuna", None)
    assert len(tune(PLANS, steady, 4, first=3, drawn=3).trials) == 4
    with pytest.raises(UserError, match=r"pip install 'resilin\[tune\]'"):
        tune(PLANS, steady, 8, first=3, drawn=3)


@pytest.mark.slow
def test_proposals_are_better_than_chance_and_fail_less_and_less() -> None:
    """Without the cost model's start: regret below random search's in 8 of 10 seeds at an equal budget."""
    pytest.importorskip("optuna")
    results = {id(plan): steady(plan) for plan in PLANS}
    most, budget, wins, failed = max(one.rate for one in results.values()), 40, 0, []
    for seed in range(10):
        shuffled = random.Random(seed).sample(PLANS, len(PLANS))
        study = tune(shuffled, lambda plan: results[id(plan)], budget, seed=seed, first=0, drawn=8)
        chance = max(results[id(plan)].rate for plan in random.Random(f"other {seed}").sample(PLANS, budget))
        assert study.best is not None
        wins += most - study.best.outcome.rate <= most - chance
        bad = [trial.outcome.status != "ok" for trial in study.trials]
        failed.append((mean(bad[: budget // 3]), mean(bad[-budget // 3 :])))
    assert wins >= 8
    assert mean(late for _, late in failed) < mean(early for early, _ in failed)


def test_what_mattered_is_what_the_rate_depends_on() -> None:
    pytest.importorskip("sklearn")
    few = random.Random(0).sample(PLANS, 12)
    study = tune(few, lambda plan: Outcome("ok", 1000.0 * plan.degrees.tensor), 12, first=12)
    found = sensitivity(study)
    assert next(iter(found)) == "tensor"
    assert sensitivity(tune(few, steady, 2)) == {}


def test_a_run_that_cannot_begin_is_a_failed_trial(tmp_path: Path) -> None:
    found = run_trial("name = 3", tmp_path / "trial", 8, 60)
    assert (found.status, found.rate) == ("crash", 0.0)
    assert found.reason


def test_a_trial_that_takes_too_long_has_failed(tmp_path: Path) -> None:
    assert run_trial("", tmp_path / "trial", 8, 0.01).status == "timeout"
