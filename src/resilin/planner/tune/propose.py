"""Which layout to try next: by trees, by optuna's TPE, or by chance."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from resilin.config import UserError
from resilin.planner.tune.features import Candidate, Choice, Known, row_of
from resilin.planner.tune.surrogate import Floats, Seen, Surrogate, expected_gain, weight
from resilin.planner.tune.trial import Trial

_ASKS = 64
"""Proposals of TPE for one trial, many of which are impossible, or known."""


@dataclass(frozen=True)
class Position:
    """Where a study stands.

    Attributes:
        left: layouts that may be tried, none of which was; one at least.
        trials: so far.
        pending: layouts whose trials are under way.
        known: values of choices.
        earlier: trials of other studies.
        number: of the trial to come.
        delay: of the first trial that is proposed.
        seed: of what is drawn.
    """

    left: Sequence[Candidate]
    trials: Sequence[Trial]
    pending: Sequence[Candidate]
    known: Known
    earlier: Sequence[Trial]
    number: int
    delay: int
    seed: int


@dataclass(frozen=True, slots=True)
class Proposal:
    """What to try.

    Attributes:
        chosen: the layout.
        gain: by how much the best that is left is expected to be above the best so far, as a share; inf: not known.
    """

    chosen: Candidate
    gain: float = math.inf


Proposer = Callable[[Position], Proposal]


def by_chance(at: Position) -> Proposal:
    """Any."""
    return Proposal(random.Random(f"{at.seed} {at.number}").choice(at.left))


def by_trees(at: Position) -> Proposal:
    """The largest upper bound of what a trial is expected to give: its rate where it runs, the worst where it fails.

    Raises:
        UserError: scikit-learn is not installed.
    """
    tried = [*at.earlier, *at.trials]
    if not any(one.ran for one in tried):
        return Proposal(_away(at))
    first = at.left[0].hint
    seen = Seen(
        np.array([row_of(one.choices, at.known, one.hint if first else None) for one in tried]),
        np.array([math.log(one.outcome.rate) if one.ran else 0.0 for one in tried]),
        np.array([math.log(one.hint.rate) if first and one.hint else 0.0 for one in tried]),
        np.array([not one.ran for one in tried]),
        np.array([one.outcome.status == "oom" for one in tried]),
        len(at.known) + list(first.numbers).index("memory") if first is not None else None,
    )
    seed = random.Random(f"{at.seed} {at.number}").randrange(2**31)
    trees = Surrogate(seen, seed, len(at.known), [one.row for one in at.pending])
    rows_MF = np.array([one.row for one in at.left])
    mean_M, spread_M = trees.rate(rows_MF)
    mean_M = mean_M + np.array([math.log(one.hint.rate) if one.hint else 0.0 for one in at.left])
    runs_M = trees.runs(rows_MF)
    best, worst = _extremes(at.trials, mean_M)
    bound_M = mean_M + weight(at.number, at.delay) * spread_M
    # What fails gives the worst rate so far. Of equals, by chance.
    hoped_M = runs_M * np.maximum(bound_M - worst, 0.0)
    hoped_M = hoped_M + 1e-9 * np.random.default_rng(seed).random(len(hoped_M))
    gain_M = runs_M * expected_gain(mean_M, spread_M, best)
    return Proposal(at.left[int(hoped_M.argmax())], math.expm1(float(gain_M.max())))


def _extremes(trials: Sequence[Trial], mean_M: Floats) -> tuple[float, float]:
    """The best and the worst logarithm of a rate so far, which failures count as; of what is expected, if none ran."""
    ran = [math.log(one.outcome.rate) for one in trials if one.ran]
    return (max(ran), min(ran)) if ran else (float(mean_M.min()), float(mean_M.min()))


def _away(at: Position) -> Candidate:
    """Where nothing has run yet: what needs least memory by the cost model, or else what is farthest from all tried."""
    if at.left[0].hint is not None:
        return min(at.left, key=lambda one: one.hint.numbers["memory"] if one.hint else 0.0)
    pool = random.Random(f"{at.seed} {at.number}").sample(at.left, len(at.left))
    tried = [*(trial.choices for trial in at.trials), *(one.choices for one in at.pending)]
    return max(pool, key=lambda one: min((_apart(one.choices, other) for other in tried), default=0.0))


def _apart(one: Mapping[str, Choice], other: Mapping[str, Choice]) -> float:
    """How far two layouts are: degrees and rows by their doublings, names by whether they differ."""

    def of(a: Choice, b: Choice) -> float:
        return abs(math.log2(a / b)) if isinstance(a, int) and isinstance(b, int) else float(a != b)

    return sum(of(value, other[name]) for name, value in one.items())


def by_tpe(at: Position) -> Proposal:
    """Of what optuna's TPE proposes and can be (of all that is left, where nothing can), the one whose like did best.

    Raises:
        UserError: optuna is not installed.
    """
    try:
        import optuna
    except ImportError:
        raise UserError("tuning by TPE needs optuna: pip install 'resilin[tune]'") from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    distributions: dict[str, Any] = {
        name: optuna.distributions.CategoricalDistribution(each) for name, each in at.known.items()
    }
    seed = random.Random(f"{at.seed} {at.number}").randrange(2**31)
    sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=0, multivariate=True)
    asked = optuna.create_study(direction="maximize", sampler=sampler)
    worst = min((trial.outcome.rate for trial in at.trials if trial.ran), default=0.0)
    for trial in at.trials:
        value = trial.outcome.rate if trial.ran else worst
        chosen = {name: trial.choices[name] for name in at.known}
        asked.add_trial(optuna.trial.create_trial(params=chosen, distributions=distributions, value=value))
    by_choice = {tuple(one.choices[name] for name in at.known): one for one in at.left}
    proposed = {}
    for _ in range(_ASKS):
        wanted = asked.ask(distributions).params
        key = tuple(wanted[name] for name in at.known)
        if key in by_choice:
            proposed[key] = by_choice[key]
    return Proposal(max((proposed or by_choice).values(), key=lambda one: _like(one.choices, at.trials)))


def _like(own: Mapping[str, Choice], trials: Sequence[Trial]) -> float:
    """The mean rate of what was tried, those that are alike counting most; failures count as no rate."""
    total, weights = 0.0, 0.0
    for trial in trials:
        near = 4.0 ** -_apart(own, trial.choices)
        weights += near
        total += near * trial.outcome.rate
    return total / weights if weights else 0.0
