"""What trials say of layouts that were not tried: extremely randomised trees for rates, and for failing.

The rules are those of the tuner of Dash et al. 2023 (arXiv 2312.12705), the search of DeepHyper: trees whose spread is
the uncertainty, failures that count as the worst that was seen, an upper confidence bound whose weight of the spread
falls in rounds of ten. Three things are added: trees that learn which layouts fail; a spread that grows with the
distance to what has run, since trees agree about what none of them has seen; and, where a cost model knows a layout,
trees for what it is wrong by rather than for the rate itself.

Shapes: N trials, M layouts, F numbers of a layout.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from resilin.config import UserError

Floats = npt.NDArray[np.float64]
TREES, FAILING_TREES = 10, 20
LEAST_DECREASE = 0.005
"""Of the variance of scaled values, by which a split of a tree has to pay."""
MOST_SPREAD, LEAST_SPREAD, ROUND = 1.96, 0.01, 10
OUTLIER = 1.5
"""Times the distance between quartiles: what lies further below them counts as being there."""
LEAST_RANGE = 0.1
"""Of what was seen, in logarithms: a single trial says nothing of how much rates differ."""
FAR = 0.4
"""The spread, over the range of what was seen, of what is far from everything that ran."""


@dataclass(frozen=True)
class Seen:
    """Trials as numbers.

    Attributes:
        rows_NF: of their layouts.
        rates_N: logarithms of their tokens a second; of failures, anything.
        prior_N: logarithms of what the cost model said; 0 where nothing did.
        failed_N: whether they failed.
        memory_N: whether memory was what they failed of.
        needed: the number of a row that tells the memory which a cost model expects; None: none does.
    """

    rows_NF: Floats
    rates_N: Floats
    prior_N: Floats
    failed_N: npt.NDArray[np.bool_]
    memory_N: npt.NDArray[np.bool_]
    needed: int | None = None


def beyond(seen: Seen) -> Floats:
    """(N,) of trials that ran, what their rates are beyond the prior, in logarithms.

    Values far below all others, such as of a run that something disturbed, are drawn nearer: one of them would have
    the trees speak of little else.
    """
    found = (seen.rates_N - seen.prior_N)[~seen.failed_N]
    low, high = np.quantile(found, [0.25, 0.75])
    return np.asarray(np.maximum(found, low - OUTLIER * (high - low)))


class Surrogate:
    """Trees fitted to trials.

    Args:
        seen: the trials, of which one ran at least.
        seed: of the trees.
        choices: how many of the first numbers of a row are choices, which distances are of.
        lies: rows whose trials are under way: they count as good as the best so far, so that others are proposed.

    Raises:
        UserError: scikit-learn is not installed.
    """

    def __init__(self, seen: Seen, seed: int, choices: int, lies: Sequence[Sequence[float]] = ()) -> None:
        try:
            from sklearn.ensemble import ExtraTreesRegressor
        except ImportError:
            raise UserError("tuning needs scikit-learn: pip install 'resilin[tune]'") from None
        values_N, rows_NF = beyond(seen), seen.rows_NF[~seen.failed_N]
        self._choices, self._ran_NF = choices, rows_NF[:, :choices]
        self._low, self._range = float(values_N.min()), max(float(np.ptp(values_N)), LEAST_RANGE)
        scaled_N = (values_N - self._low) / self._range
        if lies:
            rows_NF = np.concatenate([rows_NF, np.array(lies)])
            scaled_N = np.concatenate([scaled_N, np.full(len(lies), scaled_N.max())])
        self._trees = ExtraTreesRegressor(
            n_estimators=TREES,
            max_features=1.0,
            bootstrap=False,
            min_impurity_decrease=LEAST_DECREASE,
            random_state=seed,
        ).fit(rows_NF, scaled_N)
        # Of memory layouts fail by what they are expected to need, whatever their choices: with these, too, trees would
        # take the choices of large layouts for the cause. Of all else they fail by their choices.
        every = list(range(seen.rows_NF.shape[1]))
        causes = [(seen.failed_N, every)]
        if seen.needed is not None:
            causes = [(seen.memory_N, [seen.needed]), (seen.failed_N & ~seen.memory_N, every)]
        self._failing = [
            (
                ExtraTreesRegressor(
                    n_estimators=FAILING_TREES, max_features=1.0, bootstrap=False, random_state=seed
                ).fit(seen.rows_NF[:, columns], failed_N.astype(float)),
                columns,
            )
            for failed_N, columns in causes
            if failed_N.any()
        ]

    def rate(self, rows_MF: Floats) -> tuple[Floats, Floats]:
        """(M,) the mean of the trees, and their standard deviation: of logarithms beyond the prior."""
        each_TM = np.array([tree.predict(rows_MF) for tree in self._trees.estimators_])
        own_MF = rows_MF[:, : self._choices]
        apart_M = np.min([np.abs(own_MF - ran_F).sum(axis=1) for ran_F in self._ran_NF], axis=0)
        spread_M = np.maximum(each_TM.std(axis=0), FAR * (1 - 2.0**-apart_M))
        return self._low + self._range * each_TM.mean(axis=0), self._range * spread_M

    def runs(self, rows_MF: Floats) -> Floats:
        """(M,) the chance that a layout runs."""
        chance_M = np.ones(len(rows_MF))
        for trees, columns in self._failing:
            own_MF = rows_MF[:, columns]
            chance_M = chance_M * (1 - np.mean([tree.predict(own_MF) for tree in trees.estimators_], axis=0))
        return chance_M


def weight(number: int, delay: int) -> float:
    """Of the spread in the upper bound, for a trial: falling from 1.96 to 0.01 in rounds of ten.

    Args:
        number: of the trial, from 0.
        delay: trials before the first that is proposed.
    """
    fall = math.log(MOST_SPREAD / LEAST_SPREAD) / (ROUND - 1)
    return MOST_SPREAD * math.exp(-fall * ((number - delay) % ROUND))


def expected_gain(mean_M: Floats, spread_M: Floats, best: float) -> Floats:
    """(M,) by how much each is expected to be above the best, as a normal variable (expected improvement)."""
    above_M = mean_M - best
    sure_M = spread_M < 1e-12
    z_M = above_M / np.where(sure_M, 1.0, spread_M)
    inside_M = np.array([0.5 * (1 + math.erf(z / math.sqrt(2))) for z in z_M])
    found_M = above_M * inside_M + spread_M * np.exp(-0.5 * z_M**2) / math.sqrt(2 * math.pi)
    return np.asarray(np.where(sure_M, np.maximum(above_M, 0.0), found_M))
