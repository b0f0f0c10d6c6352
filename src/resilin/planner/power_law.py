"""The power law of a loss curve, L(t) = a t^-k + c: fitting it, and what follows from a fit.

Under one epoch the test loss is straight in log-log over a long middle range of iterations (Komatsuzaki, "One Epoch
Is All You Need", arXiv 1906.06669). It is a statement for a near-constant learning rate: points of the warm-up, of
the first 5 % and of the final decay are left out of a fit.

Arrays are one-dimensional: t (iterations or tokens, > 0) and L (nats per token, > 0), of one length N.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Curve = Sequence[float] | npt.NDArray[np.float64]

_GOLDEN = (math.sqrt(5) - 1) / 2
_EXACT = 1e-9  # below this relative residual a point lies on the law, whatever the spread of the fit


@dataclass(frozen=True, slots=True)
class PowerLaw:
    """L(t) = a t^-k + c.

    Attributes:
        a: the reducible loss at t = 1.
        k: the exponent, positive where the loss falls.
        c: the floor, the loss after endless training; 0 where none was fitted.
        sigma: standard deviation of the fit's residuals in log L, corrected for the fitted parameters.
        points: how many points were fitted.
    """

    a: float
    k: float
    c: float = 0.0
    sigma: float = 0.0
    points: int = 0

    def loss(self, t: float) -> float:
        """The predicted loss at `t`."""
        return float(self.a * t**-self.k + self.c)

    def steps_to(self, loss: float) -> float:
        """t* = ((L* - c) / a)^(-1/k), where the law reaches a loss; infinite for one it never reaches."""
        if loss <= self.c or self.k <= 0:
            return math.inf
        return float(((loss - self.c) / self.a) ** (-1 / self.k))

    def crossing(self, other: PowerLaw, low: float = 1.0, high: float = 1e15) -> float | None:
        """The last t in [low, high] where two laws meet, beyond which the other one is ahead or behind for good.

        None where they do not meet there: one plan is better all along.
        """

        def gap(log_t: float) -> float:
            return self.loss(math.exp(log_t)) - other.loss(math.exp(log_t))

        grid = np.linspace(math.log(low), math.log(high), 513)
        signs = [gap(x) > 0 for x in grid]
        changes = [i for i in range(512) if signs[i] != signs[i + 1]]
        if not changes:
            return None
        a, b = float(grid[changes[-1]]), float(grid[changes[-1] + 1])
        for _ in range(60):
            half = (a + b) / 2
            a, b = (half, b) if (gap(half) > 0) == signs[changes[-1]] else (a, half)
        return math.exp((a + b) / 2)

    def residual(self, t: float, loss: float) -> float:
        """log(measured / predicted): positive above the law."""
        return math.log(loss / self.loss(t))


def _columns(t: Curve, losses: Curve, parameters: int) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    t_N, loss_N = np.asarray(t, dtype=np.float64), np.asarray(losses, dtype=np.float64)
    if t_N.shape != loss_N.shape or t_N.ndim != 1:
        raise ValueError(f"a curve has one loss for each t; got shapes {t_N.shape} and {loss_N.shape}")
    good = np.isfinite(t_N) & np.isfinite(loss_N) & (t_N > 0) & (loss_N > 0)
    if not bool(good.all()):
        raise ValueError(f"point {int(np.argmin(good))} of the curve is not positive and finite: leave it out")
    if len(np.unique(t_N)) < parameters:
        raise ValueError(
            f"{len(np.unique(t_N))} distinct t are too few for a law of {parameters} numbers: train longer"
        )
    return t_N, loss_N


def log_uniform(t: Curve, losses: Curve, bins: int = 64) -> tuple[list[float], list[float]]:
    """A curve resampled so that each octave weighs the same.

    Every-step samples in log-log are dominated by the late steps. t is cut into `bins` equal parts of log t, and the
    points of each part are averaged in (log t, log L), which leaves a pure power law where it is.
    """
    t_N, loss_N = _columns(t, losses, 1)
    x_N, y_N = np.log(t_N), np.log(loss_N)
    low, span = x_N.min(), max(float(np.ptp(x_N)), 1e-12)
    bin_N = np.minimum(((x_N - low) / span * bins).astype(int), bins - 1)
    kept = np.unique(bin_N)
    t_mean = [float(np.exp(x_N[bin_N == b].mean())) for b in kept]
    loss_mean = [float(np.exp(y_N[bin_N == b].mean())) for b in kept]
    return t_mean, loss_mean


def middle(
    t: Curve, losses: Curve, total: float, warmup: float = 0.0, decay_from: float | None = None
) -> tuple[list[float], list[float]]:
    """The part of a curve to which the law applies: max(warm-up, 5 % of the run) < t <= start of the decay."""
    first, last = max(warmup, 0.05 * total), math.inf if decay_from is None else decay_from
    pairs = [(float(x), float(y)) for x, y in zip(t, losses, strict=True) if first < x <= last]
    return [x for x, _ in pairs], [y for _, y in pairs]


def _line(
    x_N: npt.NDArray[np.float64], y_N: npt.NDArray[np.float64], weight_N: npt.NDArray[np.float64]
) -> tuple[float, float, float]:
    """Weighted least squares of y = intercept + slope x; also the weighted sum of squares left over."""
    total = weight_N.sum()
    x_mean, y_mean = (weight_N * x_N).sum() / total, (weight_N * y_N).sum() / total
    dx_N, dy_N = x_N - x_mean, y_N - y_mean
    slope = float((weight_N * dx_N * dy_N).sum() / (weight_N * dx_N**2).sum())
    left = float((weight_N * (dy_N - slope * dx_N) ** 2).sum())
    return float(y_mean - slope * x_mean), slope, left


def _least(f: Callable[[float], float], low: float, high: float) -> float:
    """Where a function with one valley on [low, high] is least, by golden section."""
    inner, outer = high - _GOLDEN * (high - low), low + _GOLDEN * (high - low)
    f_inner, f_outer = f(inner), f(outer)
    for _ in range(90):  # 0.618**90 is below the spacing of doubles
        if f_inner < f_outer:
            high, outer, f_outer = outer, inner, f_inner
            inner = high - _GOLDEN * (high - low)
            f_inner = f(inner)
        else:
            low, inner, f_inner = inner, outer, f_outer
            outer = low + _GOLDEN * (high - low)
            f_outer = f(outer)
    return (low + high) / 2


def fit_power_law(t: Curve, losses: Curve, floor: bool = False) -> PowerLaw:
    """The least-squares law through a curve, in (log t, log L).

    With a floor, c is found by a one-dimensional search over [0, min L): for each c the best (a, k) is a weighted
    line through (log t, log(L - c)), the weights ((L - c) / L)^2 turning its residuals into residuals of log L.

    Args:
        t: where the losses were measured, near log-uniform (see `log_uniform`) and inside the law's range (`middle`).
        losses: the losses.
        floor: whether to fit c too.

    Raises:
        ValueError: fewer than 2 (3 with a floor) distinct t, or a point that is not positive and finite.
    """
    t_N, loss_N = _columns(t, losses, 3 if floor else 2)
    x_N = np.log(t_N)

    def at(c: float) -> tuple[float, float, float]:
        return _line(x_N, np.log(loss_N - c), ((loss_N - c) / loss_N) ** 2)

    c = 0.0
    if floor:
        # The search runs over log(min L - c), which resolves floors close below the curve; a grid first, since the
        # valley is narrow there.
        least = float(loss_N.min())
        grid = np.linspace(math.log(least), math.log(least) - 16, 129)
        best = int(np.argmin([at(least - math.exp(u))[2] for u in grid]))
        low, high = grid[min(best + 1, 128)], grid[max(best - 1, 0)]
        c = max(0.0, least - math.exp(_least(lambda u: at(least - math.exp(u))[2], float(low), float(high))))
    intercept, slope, left = at(c)
    freedom = max(1, len(t_N) - (3 if floor else 2))
    return PowerLaw(math.exp(intercept), -slope, c, math.sqrt(left / freedom), len(t_N))


@dataclass(frozen=True, slots=True)
class Departure:
    """The first point from which a curve has left its law.

    Attributes:
        t: where.
        residual: log(measured / predicted) there.
        sigmas: the same in standard deviations of the fit.
        above: True for a loss above the law (over-fitting, instability), False below it (a learning-rate decay).
    """

    t: float
    residual: float
    sigmas: float
    above: bool


def departure(law: PowerLaw, t: Curve, losses: Curve, sigmas: float = 3.0, run: int = 1) -> Departure | None:
    """The first of `run` successive points on the same side whose residuals exceed `sigmas` of the fit's spread.

    Args:
        law: fitted to earlier points.
        t: where the later losses were measured, ascending.
        losses: those losses.
        sigmas: how many standard deviations are too many.
        run: how many points in a row it takes; more than 1 for noisy single-step losses.
    """
    limit = sigmas * max(law.sigma, _EXACT)
    streak: list[Departure] = []
    for x, y in zip(t, losses, strict=True):
        residual = law.residual(float(x), float(y))
        if abs(residual) <= limit:
            streak = []
            continue
        found = Departure(float(x), residual, abs(residual) / max(law.sigma, _EXACT), residual > 0)
        streak = [*streak, found] if streak and streak[-1].above == found.above else [found]
        if len(streak) == run:
            return streak[0]
    return None
