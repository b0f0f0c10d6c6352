"""How sure a fit is: the same fit of resampled points, many times."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np

from resilin.keys import Keys
from resilin.planner.power_law import Curve, PowerLaw, fit_power_law

Fit = TypeVar("Fit")
DRAWS = 200
MIDDLE = 0.9  # of the resampled fits lie in a band


@dataclass(frozen=True, slots=True)
class Band:
    """A value, and where most resampled fits have it.

    Attributes:
        value: of the fit to all points.
        low: below it lie 5 % of the resampled fits.
        high: above it lie 5 %.
    """

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.4g} ({self.low:.4g} to {self.high:.4g})"


@dataclass(frozen=True, slots=True)
class Bootstrapped(Generic[Fit]):
    """A fit and its resampled siblings.

    Attributes:
        fit: to all points.
        others: to points drawn from these with replacement; draws that could not be fitted are left out.
    """

    fit: Fit
    others: tuple[Fit, ...]

    def band(self, of: Callable[[Fit], float]) -> Band:
        """Of anything that follows from a fit: a loss, a size, an exponent.

        Raises:
            ValueError: too few draws could be fitted to say anything.
        """
        if len(self.others) < 20:
            raise ValueError(f"only {len(self.others)} resampled fits: more points are needed for a band")
        values = np.array([of(other) for other in self.others])
        edge = (1 - MIDDLE) / 2
        low, high = (float(np.quantile(values, at)) for at in (edge, 1 - edge))
        return Band(of(self.fit), low, high)


def resample(count: int, draws: int = DRAWS, seed: int = 0) -> list[list[int]]:
    """For each draw which of so many points it has, with replacement; the same for the same seed."""
    keys = Keys.of_step(seed, 0).fold("bootstrap")
    words_KN = keys.bits((draws, count))[0].numpy()
    found: list[list[int]] = (words_KN * count >> 32).tolist()
    return found


def bootstrap(fit: Callable[[Sequence[int]], Fit], count: int, draws: int = DRAWS, seed: int = 0) -> Bootstrapped[Fit]:
    """Fit all points, and resampled ones.

    Args:
        fit: to the points of these numbers; raises ValueError where they are too few or too alike.
        count: of the points.
        draws: how many times.
        seed: of the draws.
    """
    others = []
    for points in resample(count, draws, seed):
        try:
            others.append(fit(points))
        except ValueError:
            continue
    return Bootstrapped(fit(range(count)), tuple(others))


def bootstrap_power_law(
    t: Curve, losses: Curve, floor: bool = False, draws: int = DRAWS, seed: int = 0
) -> Bootstrapped[PowerLaw]:
    """`fit_power_law` with its resampled siblings: `.band(lambda law: law.loss(t))` and the like.

    Points of one run are not independent, so that bands are narrower than they should be; those of many runs are.
    """
    t_N, loss_N = np.asarray(t, dtype=np.float64), np.asarray(losses, dtype=np.float64)

    def fit(points: Sequence[int]) -> PowerLaw:
        chosen = list(points)
        return fit_power_law(t_N[chosen], loss_N[chosen], floor)

    return bootstrap(fit, len(t_N), draws, seed)
