"""Which choices mattered in a study: Shapley values of trees fitted to its trials."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from statistics import fmean

import numpy as np

from resilin.config import UserError
from resilin.planner.tune.features import Choice, numbers, values
from resilin.planner.tune.shapley import shapley
from resilin.planner.tune.study import Study

LEAST_TRIALS = 5


@dataclass(frozen=True, slots=True)
class Influence:
    """What one choice did to the rate.

    Attributes:
        size: mean size of its contribution, tokens a second.
        by_value: mean contribution of each value that was tried: above 0 it helped.
    """

    size: float
    by_value: dict[Choice, float]


def sensitivity(study: Study, seed: int = 0) -> dict[str, Influence]:
    """What each choice did, the largest first; empty for too few good trials.

    Extremely randomised trees are fitted to the trials that did not fail, and explained exactly.

    Raises:
        UserError: scikit-learn is not installed.
    """
    good = [trial for trial in study.trials if trial.ran]
    known = values([study.plan_of(trial) for trial in good])
    if len(good) < LEAST_TRIALS or not known:
        return {}
    try:
        from sklearn.ensemble import ExtraTreesRegressor
    except ImportError:
        raise UserError("explaining a study needs scikit-learn: pip install 'resilin[tune]'") from None
    rows = np.array([numbers(trial.choices, known) for trial in good])
    rates = np.array([trial.outcome.rate for trial in good])
    trees = ExtraTreesRegressor(n_estimators=50, random_state=seed).fit(rows, rates)
    parts = np.array([shapley(lambda rows_NF: np.asarray(trees.predict(rows_NF)), row, rows) for row in rows])
    found = {}
    for place, name in enumerate(known):
        each: dict[Choice, list[float]] = defaultdict(list)
        for trial, part in zip(good, parts[:, place], strict=True):
            each[trial.choices[name]].append(float(part))
        means = {value: fmean(each[value]) for value in known[name]}
        found[name] = Influence(float(np.abs(parts[:, place]).mean()), means)
    return dict(sorted(found.items(), key=lambda pair: -pair[1].size))


def told(found: dict[str, Influence]) -> list[str]:
    """A line for each choice."""
    lines = []
    for name, one in found.items():
        by_value = ", ".join(f"{value} {part:+,.0f}" for value, part in one.by_value.items())
        lines.append(f"{name}: {one.size:,.0f} tokens/s ({by_value})")
    return lines
