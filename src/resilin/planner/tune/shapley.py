"""Which choice mattered: Shapley values of a function of few features, exactly.

phi_i(x) = sum over sets S without i of |S|! (n - |S| - 1)! / n! (v(S with i) - v(S)), where v(S) is the mean of the
function over background rows whose features S are those of x (the interventional value function; Lundberg and Lee
2017, arXiv 1705.07874).

Shapes: N rows, F features.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations
from math import factorial

import numpy as np
import numpy.typing as npt

Matrix = npt.NDArray[np.float64]
Function = Callable[[Matrix], Matrix]
"""(N, F) rows -> (N,) values."""
MOST_FEATURES = 10


def shapley(function: Function, x_F: Matrix, background_NF: Matrix) -> Matrix:
    """(F,) the contribution of each feature of x to the function there, beside the mean over the background.

    They add up to function(x) less that mean.

    Args:
        function: of rows.
        x_F: what is explained.
        background_NF: rows that say what is usual.

    Raises:
        ValueError: more than 10 features, whose 2^F sets would take too long.
    """
    count = len(x_F)
    if count > MOST_FEATURES:
        raise ValueError(f"{count} features have {2**count} sets: explain {MOST_FEATURES} at most")
    sets = [chosen for size in range(count + 1) for chosen in combinations(range(count), size)]
    rows_SNF = np.repeat(background_NF[None], len(sets), axis=0)
    for rows_NF, chosen in zip(rows_SNF, sets, strict=True):
        rows_NF[:, chosen] = x_F[list(chosen)]
    # One call for all sets: trees take as long for a row as for a hundred.
    means_S = function(rows_SNF.reshape(-1, count)).reshape(len(sets), -1).mean(axis=1)
    known = {frozenset(chosen): float(mean) for chosen, mean in zip(sets, means_S, strict=True)}
    found = np.zeros(count)
    for feature in range(count):
        others = [one for one in range(count) if one != feature]
        for size in range(count):
            weight = factorial(size) * factorial(count - size - 1) / factorial(count)
            for chosen in combinations(others, size):
                without = frozenset(chosen)
                found[feature] += weight * (known[without | {feature}] - known[without])
    return found


def importance(function: Function, rows_NF: Matrix) -> Matrix:
    """(F,) the mean size of each feature's contribution over rows, which are the background too."""
    return np.asarray(np.abs([shapley(function, row, rows_NF) for row in rows_NF]).mean(axis=0))
