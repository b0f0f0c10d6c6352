"""How many tokens a parameter should see, and who says so.

The ratio near 5 is what a digest of arXiv 1906.06669 reports for its Transformers on LM1B: small models, tuned rates,
short runs. Later scaling laws (Hoffmann et al., 2022) put it near 20. With a little of the budget it is measured:
three small runs of equal cost and different sizes, a parabola through their losses over log(T / P).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

FAITHFUL, PRACTICAL = 5.0, 20.0
PILOT_SHARE = 0.02  # of the budget, for all pilot runs together
PILOT_RATIOS = (2.0, 10.0, 50.0)
PILOT_STEPS = 100  # a pilot of fewer steps is all transient

Mode = Literal["faithful", "practical"]


@dataclass(frozen=True, slots=True)
class Pilot:
    """A small finished run.

    Attributes:
        parameters: P, without embeddings.
        tokens: T, each seen once.
        loss: at its end, held-out or online.
        cost: what it spent, in the unit of the budget.
    """

    parameters: float
    tokens: float
    loss: float
    cost: float

    @property
    def ratio(self) -> float:
        """T / P."""
        return self.tokens / self.parameters


@dataclass(frozen=True, slots=True)
class Rho:
    """The ratio in use.

    Attributes:
        value: tokens per parameter.
        source: in words, for the plan.
    """

    value: float
    source: str

    def __post_init__(self) -> None:
        if not (self.value > 0 and math.isfinite(self.value)):
            raise ValueError(f"rho is tokens per parameter: a positive number such as 5 or 20, not {self.value:g}")


def fit_rho(pilots: Sequence[Pilot]) -> float | None:
    """The T / P of least loss among runs of equal cost, from a parabola in log(T / P); None if no valley shows.

    A valley outside the measured ratios is no measurement: the parabola's minimum counts only inside them.

    Raises:
        ValueError: fewer than three different ratios, or costs that differ by more than a tenth.
    """
    ratios = [pilot.ratio for pilot in pilots]
    if len(set(ratios)) < 3:
        raise ValueError(f"rho is fitted to at least three runs of different T / P; got {len(set(ratios))}")
    costs = [pilot.cost for pilot in pilots]
    if max(costs) > 1.1 * min(costs):
        raise ValueError("rho is fitted to runs of equal cost; these differ by more than a tenth")
    x_N, y_N = np.log(ratios), np.array([pilot.loss for pilot in pilots])
    curvature, slope, _ = (float(v) for v in np.polyfit(x_N, y_N, 2))
    if curvature <= 0:
        return None
    bottom = -slope / (2 * curvature)
    return math.exp(bottom) if float(x_N.min()) <= bottom <= float(x_N.max()) else None


def choose_rho(rule: float | Literal["auto"], mode: Mode = "practical", pilots: Sequence[Pilot] = ()) -> Rho:
    """The ratio to plan with: the given one; else fitted to pilot runs; else 5 or 20 by mode.

    Args:
        rule: a number, or "auto".
        mode: faithful to the paper (5) or practical (20), where nothing was measured.
        pilots: small runs, if there are any.
    """
    if rule != "auto":
        return Rho(float(rule), "as given")
    default = FAITHFUL if mode == "faithful" else PRACTICAL
    origin = "the paper's value" if mode == "faithful" else "later scaling laws' value"
    if not pilots:
        return Rho(default, f"{mode} default, {origin}; no pilot runs")
    fitted = fit_rho(pilots)
    if fitted is None:
        return Rho(default, f"{mode} default, {origin}; the pilot runs show no valley between their ratios")
    return Rho(fitted, f"fitted to {len(pilots)} pilot runs")
