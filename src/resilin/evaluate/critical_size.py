"""Extrapolating a norm over model sizes, to know at which size training would fail before paying for it.

Source: Wortsman et al. (2023), section 3.3: at each learning rate, the largest attention logit early in training is
fitted by a quadratic in the logarithm of the model size; all their runs above 1e4 diverged.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

PAPER_THRESHOLD = 1e4
"""Attention logits above this diverged in every run of the paper."""


@dataclass(frozen=True, slots=True)
class CriticalSize:
    """A fit of log10(norm) over log10(size) and where it crosses a threshold.

    Attributes:
        size: the first size at which the fit reaches the threshold; None: at none up to `horizon`.
        lowest, highest: the same over the fits that leave one point out (highest is None if one of them has no
            crossing); both None with too few points to leave one out.
        degree: 2, or 1 with fewer than four points.
        coefficients: of the polynomial in log10(size), highest power first.
        horizon: the largest size considered.
        residual: root mean square of the fit's error in log10(norm).
    """

    size: float | None
    lowest: float | None
    highest: float | None
    degree: int
    coefficients: tuple[float, ...]
    horizon: float
    residual: float

    def at(self, size: float) -> float:
        """The fitted norm at a size."""
        return float(10.0 ** np.polyval(self.coefficients, math.log10(size)))

    def __str__(self) -> str:
        kind = "quadratic" if self.degree == 2 else "line (fewer than four sizes)"
        if self.size is None:
            return f"none below {self.horizon:.3g} parameters ({kind})"
        low = "?" if self.lowest is None else f"{self.lowest:.2g}"
        high = "none" if self.highest is None else f"{self.highest:.2g}"
        spread = "" if self.lowest is None and self.highest is None else f", {low} to {high} leaving one size out"
        return f"{self.size:.2g} parameters ({kind}{spread})"


def _crossing(coefficients: np.ndarray, target: float, first: float, last: float) -> float | None:
    """The least x in [first, last] with a fitted value at or above `target`."""
    if np.polyval(coefficients, first) >= target:
        return first
    shifted = np.array(coefficients, dtype=float)
    shifted[-1] -= target
    # Rounding leaves leading coefficients near 1e-16 of a straight line, whose far-away root is not meant.
    shifted[:-1][np.abs(shifted[:-1]) < 1e-12] = 0.0
    roots = [float(r.real) for r in np.roots(shifted) if abs(r.imag) < 1e-9 and first <= r.real <= last]
    return min(roots, default=None)


def predict_critical(
    points: Sequence[tuple[float, float]], threshold: float = PAPER_THRESHOLD, horizon: float = 1e13
) -> CriticalSize:
    """The first model size at which a norm would reach `threshold`.

    Args:
        points: (number of parameters, norm) of runs at one learning rate; sizes differ, both positive.
        threshold: the norm that training does not survive.
        horizon: sizes beyond this are not considered.

    Raises:
        ValueError: with fewer than two points, equal sizes, or numbers that are not positive and finite.
    """
    if len({size for size, _ in points}) != len(points) or len(points) < 2:
        raise ValueError(f"predicting a critical size needs at least two different sizes; got {list(points)}")
    if not all(math.isfinite(v) and v > 0 for point in points for v in point):
        raise ValueError(f"sizes and norms must be positive and finite; got {list(points)}")
    x = np.log10([size for size, _ in sorted(points)])
    y = np.log10([norm for _, norm in sorted(points)])
    degree = 2 if len(points) >= 4 else 1
    target, last = math.log10(threshold), math.log10(horizon)
    coefficients = np.polyfit(x, y, degree)
    crossing = _crossing(coefficients, target, x[0], last)
    others: list[float | None] = []
    if len(points) - 1 >= degree + 1:
        for left_out in range(len(points)):
            keep = np.arange(len(points)) != left_out
            others.append(_crossing(np.polyfit(x[keep], y[keep], degree), target, x[keep][0], last))
    found = [value for value in others if value is not None]
    return CriticalSize(
        size=None if crossing is None else float(10.0**crossing),
        lowest=float(10.0 ** min(found)) if found else None,
        highest=float(10.0 ** max(found)) if found and len(found) == len(others) else None,
        degree=degree,
        coefficients=tuple(float(c) for c in coefficients),
        horizon=horizon,
        residual=float(np.sqrt(np.mean((np.polyval(coefficients, x) - y) ** 2))),
    )
