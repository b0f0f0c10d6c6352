"""Which choices mattered in a study: Shapley values of trees fitted to its trials."""

from __future__ import annotations

import numpy as np

from resilin.config import UserError
from resilin.planner.tune.features import numbers, values
from resilin.planner.tune.shapley import importance
from resilin.planner.tune.study import Study

LEAST_TRIALS = 5


def sensitivity(study: Study, seed: int = 0) -> dict[str, float]:
    """The mean change of tokens a second that each choice makes, the largest first; empty for too few good trials.

    Extremely randomised trees are fitted to the trials that did not fail, and explained exactly.

    Raises:
        UserError: scikit-learn is not installed.
    """
    known = values(study.plans)
    good = [trial for trial in study.trials if trial.outcome.status == "ok"]
    if len(good) < LEAST_TRIALS or not known:
        return {}
    try:
        from sklearn.ensemble import ExtraTreesRegressor
    except ImportError:
        raise UserError("explaining a study needs scikit-learn: pip install 'resilin[tune]'") from None
    rows = np.array([numbers(study.plan_of(trial), known) for trial in good])
    rates = np.array([trial.outcome.rate for trial in good])
    trees = ExtraTreesRegressor(n_estimators=50, random_state=seed).fit(rows, rates)
    found = importance(lambda rows_NF: np.asarray(trees.predict(rows_NF)), rows)
    return dict(sorted(zip(known, map(float, found), strict=True), key=lambda pair: -pair[1]))
