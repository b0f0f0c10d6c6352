"""Tuning by trials: exact contributions, studies that go on, failures that count, layouts that can be."""

from __future__ import annotations

import json
import math
import random
from dataclasses import replace
from pathlib import Path
from statistics import mean

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from resilin.config import UserError
from resilin.planner.cost import Arrangement
from resilin.planner.search.find import usable
from resilin.planner.search.request import LayoutRequest, prepare
from resilin.planner.tune import Outcome, Rules, Trial, by_chance, by_tpe, importance, shapley, tune
from resilin.planner.tune.features import Hint, candidates, choices, hint_of, numbers, values
from resilin.planner.tune.propose import Position, by_trees
from resilin.planner.tune.request import TuneOptions, priced, rules_of, simulated, study_of
from resilin.planner.tune.sensitivity import sensitivity, told
from resilin.planner.tune.study import read_trials
from resilin.planner.tune.surrogate import Seen, Surrogate, beyond, expected_gain, weight
from resilin.planner.tune.trial_run import run_trial

ASKED = prepare(LayoutRequest("dgx-a100-40", 16, None, "gpt-6.7b", ("train.batch_size=64",)))
STEPS = priced(ASKED)
PLANS = [step.plan for step in STEPS]
HINTS = [hint_of(step, usable(ASKED.cluster)) for step in STEPS]


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
    assert "data" not in known  # the other degrees decide it
    rows = {tuple(numbers(choices(plan), known)) for plan in PLANS}
    assert len(rows) == len(PLANS)


# -- studies -----------------------------------------------------------------------------------------------------


def steady(plan: Arrangement) -> Outcome:
    return simulated(ASKED, 0)(plan)


def test_a_study_of_few_layouts_ends_with_all_of_them_and_the_true_best() -> None:
    few = random.Random(1).sample(PLANS, 5)
    study = tune(few, steady, 50, Rules(first=2, drawn=3))
    assert sorted(trial.layout for trial in study.trials) == sorted(map(str, few))
    rates = {str(plan): steady(plan).rate for plan in few}
    best = max(rates.values())
    assert study.best is None if best == 0 else (study.best is not None and study.best.outcome.rate == best)


def test_a_failed_trial_is_never_the_best() -> None:
    study = tune(PLANS[:4], lambda plan: Outcome("oom", reason="too large"), 4, Rules(first=1, drawn=0))
    assert study.best is None
    assert [trial.outcome.status for trial in study.trials] == ["oom"] * 4
    assert len({trial.layout for trial in study.trials}) == 4
    assert len(tune(PLANS, lambda plan: Outcome("oom"), 30, Rules(most_failures=7)).trials) == 7


def test_an_interrupted_study_goes_on_as_if_it_had_not_been(tmp_path: Path) -> None:
    rules = Rules(seed=3)
    whole = tune(PLANS, steady, 9, rules, hints=HINTS)
    file = tmp_path / "trials.jsonl"
    tune(PLANS, steady, 5, rules, hints=HINTS, file=file)
    rest: list[Trial] = []
    study = tune(PLANS, steady, 9, rules, hints=HINTS, file=file, tell=rest.append)
    assert study.trials == whole.trials == tuple(read_trials(file))
    assert len(rest) == 4
    assert len({trial.layout for trial in study.trials}) == 9


def test_trials_of_another_study_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "trials.jsonl"
    tune(PLANS[:3], steady, 1, file=file)
    with pytest.raises(UserError, match="use another folder"):
        tune(PLANS[5:], steady, 1, file=file)


def test_a_line_that_is_no_trial_is_named(tmp_path: Path) -> None:
    file = tmp_path / "trials.jsonl"
    file.write_text('{"number": 0}\n', encoding="utf-8")
    with pytest.raises(UserError, match="line 1: is no trial"):
        tune(PLANS[:3], steady, 2, file=file)


def test_without_its_package_the_first_trials_run_and_the_rest_say_what_is_missing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "optuna", None)
    assert len(tune(PLANS, steady, 4, Rules(first=3, drawn=3, propose=by_tpe)).trials) == 4
    with pytest.raises(UserError, match=r"pip install 'resilin\[tune\]'"):
        tune(PLANS, steady, 8, Rules(first=3, drawn=3, propose=by_tpe))


@pytest.mark.slow
def test_tpe_proposes_what_can_be() -> None:
    pytest.importorskip("optuna")
    study = tune(PLANS, steady, 12, Rules(propose=by_tpe))
    assert len({trial.layout for trial in study.trials}) == 12


def test_several_trials_run_at_once_and_none_twice() -> None:
    study = tune(PLANS, steady, 12, Rules(at_once=4, first=1, drawn=3), hints=HINTS)
    assert sorted(trial.number for trial in study.trials) == list(range(12))
    assert len({json.dumps(trial.choices) for trial in study.trials}) == 12


# -- what is proposed --------------------------------------------------------------------------------------------


def position(trials: list[Trial], pending: int = 0, hints: bool = True) -> Position:
    known = values(PLANS)
    pool = candidates(PLANS, known, HINTS if hints else ())
    tried = [trial.choices for trial in trials]
    left = [one for one in pool if one.choices not in tried]
    return Position(left[pending:], trials, left[:pending], known, (), len(trials) + pending, 0, 1)


def tried(count: int, rate: float = 1000.0) -> list[Trial]:
    return [
        Trial(n, str(plan), choices(plan), Outcome("ok", rate * (n + 1)), hint)
        for n, (plan, hint) in enumerate(zip(PLANS[:count], HINTS, strict=False))
    ]


def test_what_is_under_way_is_not_proposed_again_and_changes_what_is() -> None:
    first = by_trees(position(tried(6))).chosen
    at = position(tried(6))
    rest = [one for one in at.left if one.key != first.key]
    second = by_trees(Position(rest, at.trials, [first], at.known, (), at.number + 1, 0, 1)).chosen
    assert second.key != first.key


def test_while_nothing_has_run_less_memory_is_tried_or_what_is_far_away() -> None:
    failed = [Trial(0, str(PLANS[0]), choices(PLANS[0]), Outcome("oom"), HINTS[0])]
    least = by_trees(position(failed)).chosen
    assert least.hint is not None
    assert least.hint.numbers["memory"] == min(hint.numbers["memory"] for hint in HINTS[1:])
    far = by_trees(position(failed, hints=False)).chosen
    assert sum(far.choices[name] != value for name, value in choices(PLANS[0]).items()) >= 2


def test_a_failure_counts_as_the_worst_that_ran_and_a_worse_one_lowers_it() -> None:
    from resilin.planner.tune.propose import _extremes

    ran, none = tried(3), np.zeros(1)
    failed = Trial(9, "x", {}, Outcome("crash"))
    assert _extremes([*ran, failed], none)[1] == pytest.approx(math.log(1000))
    worse = Trial(10, "y", {}, Outcome("ok", 10.0))
    assert _extremes([*ran, failed, worse], none) == (pytest.approx(math.log(3000)), pytest.approx(math.log(10)))


def test_trees_learn_what_fails_and_what_is_quick() -> None:
    rows = np.array([[float(a), float(b)] for a in range(4) for b in range(4)])
    failed = rows[:, 0] > 1
    trees = Surrogate(Seen(rows, rows[:, 1], np.zeros(16), failed, failed), 0, 2)
    assert trees.runs(rows)[failed].max() < 0.1 < 0.9 < trees.runs(rows)[~failed].min()
    mean, spread = trees.rate(rows)
    assert mean[3] > mean[0]
    assert spread[15] > spread[3]  # nothing near it has run


def test_of_memory_layouts_fail_by_what_they_need_and_of_all_else_by_their_choices() -> None:
    """A choice of which all that were tried were too large is not given up for it."""
    choice, needed = np.array([0.0, 0, 0, 0, 1, 1, 1, 1]), np.array([-2.0, -1, -0.5, 0.5, 1, 2, 3, 4])
    rows = np.column_stack([choice, needed])
    large, none = needed > 0, np.zeros(8)
    small = np.array([[1.0, -1.5]])
    seen = Seen(rows, none, none, large, large, 1)
    assert Surrogate(seen, 0, 1).runs(small)[0] > 0.95
    assert Surrogate(replace(seen, needed=None), 0, 1).runs(small)[0] < 0.9
    crashed = choice > 0
    assert Surrogate(Seen(rows, none, none, crashed, none > 0, 1), 0, 1).runs(small)[0] < 0.7


def test_an_outlier_is_drawn_nearer() -> None:
    rates = np.array([1.0, 1.1, 1.2, 1.3, -50.0])
    found = beyond(Seen(np.zeros((5, 1)), rates, np.zeros(5), np.zeros(5, bool), np.zeros(5, bool)))
    assert found[:4] == pytest.approx(rates[:4])
    assert found[4] == pytest.approx(0.7)


def test_the_spread_counts_less_and_less_in_rounds_of_ten() -> None:
    found = [weight(number, 5) for number in range(5, 25)]
    assert found[:10] == found[10:] == sorted(found[:10], reverse=True)
    assert (found[0], found[9]) == (pytest.approx(1.96), pytest.approx(0.01))


def test_what_is_sure_gains_what_it_is_above() -> None:
    gain = expected_gain(np.array([1.0, -1.0, 0.0]), np.array([0.0, 0.0, 1.0]), 0.0)
    assert gain == pytest.approx([1.0, 0.0, 1 / math.sqrt(2 * math.pi)])


def test_a_cost_model_that_is_right_ends_a_study_soon_and_one_that_is_wrong_is_corrected() -> None:
    rate = {id(step.plan): step.tokens_per_second for step in STEPS}

    def right(plan: Arrangement) -> Outcome:
        return Outcome("ok", rate[id(plan)])

    soon = tune(PLANS, right, 60, Rules(gain=0.01), hints=HINTS)
    assert len(soon.trials) < 20
    assert soon.gain < 0.01
    assert soon.best is not None
    assert soon.best.outcome.rate == max(rate.values())

    def wrong(plan: Arrangement) -> Outcome:  # recomputing is said to be slow, and is not
        return Outcome("ok", rate[id(plan)] * (2.0 if plan.recompute == "block" else 1.0))

    found = tune(PLANS, wrong, 25, Rules(), hints=HINTS).best
    assert found is not None
    assert found.outcome.rate >= 0.9 * max(wrong(plan).rate for plan in PLANS)


def test_trials_of_another_model_are_learned_from(tmp_path: Path) -> None:
    other = LayoutRequest("dgx-a100-40", 8, None, "gpt-1.3b", ("train.batch_size=64",))
    _, before = study_of(other, tmp_path / "before", TuneOptions(trials=8, simulate=True, gain=0))
    rules = rules_of(TuneOptions(earlier=(tmp_path / "before",), trials=4))
    assert len(rules.earlier) == len(before.trials) == 8
    study = tune(PLANS, steady, 4, replace(rules, first=0, drawn=0), hints=HINTS)
    assert study.trials[0].ran  # the first one is chosen by what was seen elsewhere
    with pytest.raises(UserError, match=r"holds no trials\.jsonl"):
        rules_of(TuneOptions(earlier=(tmp_path,)))
    with pytest.raises(UserError, match="should be one of trees"):
        rules_of(TuneOptions(sampler="grid"))


@pytest.mark.slow
def test_proposals_are_better_than_chance_and_fail_less_and_less() -> None:
    """Of times nothing is known, of memory what the cost model says: 8 of 10 seeds, and half of the failures."""
    results = {id(plan): steady(plan) for plan in PLANS}
    most, budget, wins, failed = max(one.rate for one in results.values()), 40, 0, []
    for seed in range(10):
        order = random.Random(seed).sample(range(len(PLANS)), len(PLANS))
        plans = [PLANS[place] for place in order]
        hints = [Hint(1.0, {"memory": HINTS[place].numbers["memory"]}) for place in order]
        rules = Rules(seed=seed, first=0, drawn=13)
        study = tune(plans, lambda plan: results[id(plan)], budget, rules, hints=hints)
        chance = tune(plans, lambda plan: results[id(plan)], budget, replace(rules, propose=by_chance)).best
        assert study.best is not None
        wins += chance is None or most - study.best.outcome.rate <= most - chance.outcome.rate
        bad = [not trial.ran for trial in study.trials]
        failed.append((mean(bad[: budget // 3]), mean(bad[-budget // 3 :])))
    assert wins >= 8
    assert mean(late for _, late in failed) <= mean(early for early, _ in failed) / 2


def test_what_mattered_is_what_the_rate_depends_on() -> None:
    pytest.importorskip("sklearn")
    few = random.Random(0).sample(PLANS, 12)
    study = tune(few, lambda plan: Outcome("ok", 1000.0 * plan.degrees.tensor), 12, Rules(first=12))
    found = sensitivity(study)
    assert next(iter(found)) == "tensor"
    by_value = found["tensor"].by_value
    assert list(by_value.values()) == sorted(by_value.values())
    assert by_value[max(by_value)] > 0 > by_value[min(by_value)]
    assert told(found)[0].startswith("tensor: ")
    assert sensitivity(tune(few, steady, 2)) == {}


def test_a_run_that_cannot_begin_is_a_failed_trial(tmp_path: Path) -> None:
    found = run_trial("name = 3", tmp_path / "trial", 8, 60)
    assert (found.status, found.rate) == ("crash", 0.0)
    assert found.reason


def test_a_trial_that_takes_too_long_has_failed(tmp_path: Path) -> None:
    assert run_trial("", tmp_path / "trial", 8, 0.01).status == "timeout"
