"""Loss against size and tokens, L(P, T) = E + A P^-alpha + B T^-beta, and what a budget buys best by it.

Hoffmann et al. (2022, arXiv 2203.15556), equation 10 and approach 3; here fitted by least squares of relative
residuals, the three linear numbers solved for at every (alpha, beta) of a grid that closes in. Where a budget asks for
more tokens than there are, repeated ones count for what they are worth (`resilin.planner.repeats`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from resilin.planner.bootstrap import Bootstrapped, bootstrap
from resilin.planner.budget import Split
from resilin.planner.repeats import effective_tokens

Floats = npt.NDArray[np.float64]
_LOW, _HIGH, _GRID, _FINE = 0.02, 2.0, 21, 18
_FEWEST = 6  # runs: five numbers are fitted
_MUCH = 0.9  # of the squares that a law has to explain some
_COARSE = 10  # rounds of a resampled fit, which is wanted to three digits


@dataclass(frozen=True, slots=True)
class Run:
    """A finished run: P without embeddings, T tokens (each fresh), the loss it reached."""

    parameters: float
    tokens: float
    loss: float

    def __post_init__(self) -> None:
        if not all(value > 0 and math.isfinite(value) for value in (self.parameters, self.tokens, self.loss)):
            raise ValueError(f"a run has positive parameters, tokens and loss, unlike {self}")


@dataclass(frozen=True, slots=True)
class ScalingLaw:
    """L(P, T) = floor + a P^-alpha + b T^-beta.

    Attributes:
        floor: the loss that nothing gets below (E).
        a: of the size's part.
        alpha: its exponent.
        b: of the tokens' part.
        beta: its exponent.
        residual: root mean square of the relative residuals.
    """

    floor: float
    a: float
    alpha: float
    b: float
    beta: float
    residual: float = 0.0

    def loss(self, parameters: float, tokens: float, unique: float = math.inf) -> float:
        """After so many tokens, of which `unique` are different."""
        worth = effective_tokens(tokens, unique) if math.isfinite(unique) else tokens
        return float(self.floor + self.a * parameters**-self.alpha + self.b * worth**-self.beta)

    def best(self, flops: float, unique: float = math.inf) -> Split:
        """P and T of least loss with 6 P T = C.

        With fresh tokens it is P = (alpha a / (beta b))^(1/(alpha+beta)) (C/6)^(beta/(alpha+beta)) (equation 4 of the
        paper); where T would be more than there are, it is found by halving intervals of log P.

        Args:
            flops: C.
            unique: tokens there are.
        """
        if not (flops > 0 and math.isfinite(flops)):
            raise ValueError(f"a budget of FLOPs should be positive and finite, not {flops:g}")
        pairs = flops / 6
        power = self.alpha + self.beta
        parameters = (self.alpha * self.a / (self.beta * self.b)) ** (1 / power) * pairs ** (self.beta / power)
        if pairs / parameters <= unique:
            return Split(parameters, pairs / parameters)

        def lost(log_p: float) -> float:
            size = math.exp(log_p)
            return self.loss(size, pairs / size, unique)

        low, high = math.log(parameters), math.log(pairs / unique) + 1  # one valley: fewer repetitions, larger models
        for _ in range(200):
            third = (high - low) / 3
            low, high = (low, high - third) if lost(low + third) < lost(high - third) else (low + third, high)
        parameters = math.exp((low + high) / 2)
        return Split(parameters, pairs / parameters)


def fit_scaling_law(runs: Sequence[Run], rounds: int = _FINE) -> ScalingLaw:
    """The law through some runs.

    Args:
        runs: finished ones.
        rounds: in which the grid of exponents closes in, each to half its width.

    Raises:
        ValueError: fewer than six runs, three sizes or three numbers of tokens.
    """
    if len(runs) < _FEWEST or min(len({r.parameters for r in runs}), len({r.tokens for r in runs})) < 3:
        raise ValueError(
            f"a law of size and tokens needs six runs of three sizes and three lengths at least; given: {len(runs)}, "
            f"of {len({r.parameters for r in runs})} and {len({r.tokens for r in runs})}"
        )
    p_N, t_N, loss_N = (np.array([getattr(run, name) for run in runs]) for name in ("parameters", "tokens", "loss"))
    # Powers are taken of sizes near 1: those of raw ones leave no digits for the three numbers.
    p_mean, t_mean = math.exp(float(np.log(p_N).mean())), math.exp(float(np.log(t_N).mean()))
    x_N, y_N = np.log(p_N / p_mean), np.log(t_N / t_mean)
    low, high = np.log([_LOW, _LOW]), np.log([_HIGH, _HIGH])
    best: tuple[float, float, float, tuple[float, float, float]] = (math.inf, 1.0, 1.0, (0.0, 1.0, 1.0))
    for _ in range(rounds):
        alpha_G, beta_G = (
            grid.ravel() for grid in np.meshgrid(*(np.exp(np.linspace(low[i], high[i], _GRID)) for i in (0, 1)))
        )
        found = _linear(alpha_G, beta_G, x_N, y_N, loss_N)
        best = min(best, found, key=lambda one: one[0])
        middle = np.log(best[1:3])
        half = (high - low) / 4
        low, high = np.maximum(middle - half, math.log(_LOW)), np.minimum(middle + half, math.log(_HIGH))
    left, alpha, beta, (floor, a, b) = best
    falls = min(alpha, beta) > 1.01 * _LOW and a > 0 and b > 0
    inverse_N = 1 / loss_N
    constant = len(runs) - inverse_N.sum() ** 2 / (inverse_N**2).sum()  # squares that one loss for all would leave
    if not (falls and left < _MUCH * constant):
        raise ValueError("the runs' losses do not fall with size and with tokens: no law goes through them")
    return ScalingLaw(floor, a * p_mean**alpha, alpha, b * t_mean**beta, beta, math.sqrt(left / len(runs)))


def _linear(
    alpha_G: Floats, beta_G: Floats, x_N: Floats, y_N: Floats, loss_N: Floats
) -> tuple[float, float, float, tuple[float, float, float]]:
    """The best of a grid of exponents: (squares left, alpha, beta, (floor, a, b)), none of the three below zero."""
    columns_GN3 = np.stack(
        [np.ones((len(alpha_G), len(x_N))), np.exp(-alpha_G[:, None] * x_N), np.exp(-beta_G[:, None] * y_N)], axis=-1
    )
    columns_GN3 /= loss_N[:, None]  # residuals relative to the loss
    best: tuple[float, float, float, tuple[float, float, float]] = (math.inf, 1.0, 1.0, (0.0, 0.0, 0.0))
    for first in (0, 1):  # with a floor, and without
        part_GNK = columns_GN3[..., first:]
        gram_GKK = np.einsum("gnk,gnl->gkl", part_GNK, part_GNK)
        gram_GKK += 1e-13 * np.trace(gram_GKK, axis1=1, axis2=2)[:, None, None] * np.eye(3 - first)
        solved_GK = np.linalg.solve(gram_GKK, part_GNK.sum(axis=1)[..., None])[..., 0]
        left_G = ((np.einsum("gnk,gk->gn", part_GNK, solved_GK) - 1) ** 2).sum(axis=1)
        left_G[(solved_GK < 0).any(axis=1)] = math.inf
        at = int(np.argmin(left_G))
        if left_G[at] < best[0]:
            floor, a, b = (0.0, *solved_GK[at]) if first else solved_GK[at]
            best = (float(left_G[at]), float(alpha_G[at]), float(beta_G[at]), (float(floor), float(a), float(b)))
    return best


def bootstrap_scaling_law(runs: Sequence[Run], draws: int = 100, seed: int = 0) -> Bootstrapped[ScalingLaw]:
    """The law with its resampled siblings, for bands of the best size, its tokens and its loss."""

    def fit(points: Sequence[int]) -> ScalingLaw:
        return fit_scaling_law([runs[at] for at in points], _FINE if len(points) == len(set(points)) else _COARSE)

    return bootstrap(fit, len(runs), draws, seed)
