"""Win rates, plain and with the advantage of length taken out.

The length-controlled win rate of Dubois et al. 2024 (AlpacaEval 2): a logistic regression explains the preferences by
a constant (how much better the model is), the difference in length, and, where rows have it, how hard each instruction
is; the win rate is then the mean prediction with the difference in length set to zero.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

_WEAK = 1e-3
_STEPS = 200


def length_feature(lengths: Sequence[int], reference: Sequence[int]) -> NDArray[np.float64]:
    """(N,) tanh of the difference in length, in standard deviations of these differences; in (-1, 1).

    Args:
        lengths: of the model's answers.
        reference: of the answers they are compared with.
    """
    difference = np.asarray(lengths, np.float64) - np.asarray(reference, np.float64)
    spread = float(difference.std())
    return np.tanh(difference / spread) if spread > 0 else np.zeros_like(difference)


def fit_logistic(features_NF: NDArray[np.float64], targets_N: NDArray[np.float64]) -> NDArray[np.float64]:
    """(F,) weights of a logistic regression on targets in [0, 1], by Newton's method.

    Every weight has a weak penalty (1e-3 times N times its square, halved): preferences that a feature explains
    perfectly would send its weight to infinity.
    """
    count, width = features_NF.shape
    weights_F = np.zeros(width)
    penalty = _WEAK * count

    def loss(w_F: NDArray[np.float64]) -> float:
        z_N = features_NF @ w_F
        return float((np.logaddexp(0.0, z_N) - targets_N * z_N).sum() + 0.5 * penalty * (w_F @ w_F))

    for _ in range(_STEPS):
        p_N = _sigmoid(features_NF @ weights_F)
        gradient_F = features_NF.T @ (p_N - targets_N) + penalty * weights_F
        hessian_FF = (features_NF * (p_N * (1 - p_N))[:, None]).T @ features_NF + penalty * np.eye(width)
        step_F = np.linalg.solve(hessian_FF, gradient_F)
        now, size = loss(weights_F), 1.0
        while loss(weights_F - size * step_F) > now and size > 1e-6:
            size /= 2  # a whole step can be too long where the curve is flat
        weights_F = weights_F - size * step_F
        if float(np.abs(step_F).max()) < 1e-10:
            break
    return weights_F


def _sigmoid(z: NDArray[np.float64]) -> NDArray[np.float64]:
    return 0.5 * (1.0 + np.tanh(0.5 * z))


def win_rate(preferences: Sequence[float]) -> float:
    """Mean preference for the model, in percent; 50 is as good as the reference."""
    return 100.0 * float(np.mean(np.asarray(preferences, np.float64)))


def length_controlled_win_rate(
    preferences: Sequence[float],
    lengths: Sequence[int],
    reference: Sequence[int],
    difficulty: Sequence[float] | None = None,
) -> float:
    """The win rate that answers as long as the reference's would have, in percent.

    Args:
        preferences: for the model's answer, in [0, 1].
        lengths: of the model's answers.
        reference: of the reference's.
        difficulty: of each instruction, as a fit over many models gave it (AlpacaEval publishes theirs); None leaves
            that term out: one model's preferences alone cannot tell it.
    """
    columns = [np.ones(len(preferences)), length_feature(lengths, reference)]
    if difficulty is not None:
        columns.append(np.asarray(difficulty, np.float64))
    features_NF = np.stack(columns, axis=1)
    weights_F = fit_logistic(features_NF, np.asarray(preferences, np.float64))
    features_NF[:, 1] = 0.0
    return 100.0 * float(_sigmoid(features_NF @ weights_F).mean())
