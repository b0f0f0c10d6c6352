"""Whether Adam's eps is small enough for the gradients a bigger model will have.

Adam divides by sqrt(second moment) + eps; with a steady gradient of root mean square r the update is cut to
r/(r+eps). Gradients shrink as models and learning rates grow, so a default eps becomes too large unseen.
Source: Wortsman et al. (2023), section 3.4.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

WARN_WITHIN = 10.0
"""Warn where the gradient's root mean square is below this many eps."""
PROPOSE_BELOW = 1e3
"""The proposed eps is this factor below the gradient's root mean square."""


def update_kept(gradient_rms: float, eps: float) -> float:
    """The part of Adam's update that eps leaves: r/(r+eps), in [0, 1]."""
    return gradient_rms / (gradient_rms + eps)


@dataclass(frozen=True, slots=True)
class EpsAdvice:
    """A line through log(gradient RMS) over log(size), and what it says of eps.

    Attributes:
        slope, intercept: log10(rms) = slope * log10(size) + intercept.
        eps: the eps in use.
        critical_size: the size from which the fitted RMS is below 10 eps; None: the line does not fall to it.
    """

    slope: float
    intercept: float
    eps: float
    critical_size: float | None

    def rms_at(self, size: float) -> float:
        """The fitted gradient RMS at a size."""
        return float(10.0 ** (self.slope * math.log10(size) + self.intercept))

    def too_large_by(self, size: float) -> float:
        """How many times eps exceeds the largest one without a warning; at most 1 is fine."""
        return self.eps * WARN_WITHIN / self.rms_at(size)

    def warns(self, size: float) -> bool:
        """Whether the predicted gradient RMS at `size` is within ten times eps."""
        return self.too_large_by(size) > 1.0

    def proposal(self, size: float) -> float:
        """An eps a thousand times below the predicted gradient RMS."""
        return self.rms_at(size) / PROPOSE_BELOW

    def text(self, size: float) -> str:
        """One sentence of advice for a model of `size` parameters."""
        rms = self.rms_at(size)
        if not self.warns(size):
            return f"eps {self.eps:g} is fine at {size:.3g} parameters (gradient RMS {rms:.2g})"
        return (
            f"eps {self.eps:g} is too large by {self.too_large_by(size):.2g} at {size:.3g} parameters: the gradient "
            f"RMS is {rms:.2g}, so updates keep {update_kept(rms, self.eps):.0%}; use eps {self.proposal(size):.0e}"
        )


def eps_advice(points: Sequence[tuple[float, float]], eps: float) -> EpsAdvice:
    """Fit gradient RMS over model size at one learning rate.

    Args:
        points: (number of parameters, gradient RMS averaged over the last steps), at least two different sizes.
        eps: Adam's eps in these runs.

    Raises:
        ValueError: with fewer than two sizes, or numbers that are not positive and finite.
    """
    if len({size for size, _ in points}) < 2:
        raise ValueError(f"a line over model sizes needs at least two different sizes; got {list(points)}")
    if not all(math.isfinite(v) and v > 0 for point in points for v in point):
        raise ValueError(f"sizes and gradient RMS must be positive and finite; got {list(points)}")
    x = np.log10([size for size, _ in points])
    y = np.log10([rms for _, rms in points])
    slope, intercept = (float(c) for c in np.polyfit(x, y, 1))
    floor = math.log10(eps * WARN_WITHIN)
    critical = 10.0 ** min((floor - intercept) / slope, 300.0) if slope < 0 else None
    return EpsAdvice(slope, intercept, eps, critical)
