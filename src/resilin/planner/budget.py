"""What a run may spend, and how a tokens-per-parameter rule divides it: P parameters trained on T = rho P tokens.

    C = 6 P T  and  T / P = rho   =>   P = sqrt(C / (6 rho)),  T = rho P

(arXiv 1906.06669; the factor 6 and the counting of P without embeddings are ours). Under a wall-clock budget C is
seconds and the cost of a token is measured: step_time(P) rho P / b = budget is solved by bisection.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Split:
    """A budget divided, before rounding: P parameters and T tokens."""

    parameters: float
    tokens: float

    @property
    def ratio(self) -> float:
        """T / P."""
        return self.tokens / self.parameters


class Budget(Protocol):
    """Something to spend on training."""

    @property
    def amount(self) -> float:
        """How much there is, in `unit`."""

    @property
    def unit(self) -> str:
        """What is spent."""

    def per_token(self, parameters: float) -> float:
        """What a token costs a model of so many parameters."""

    def split(self, rho: float) -> Split:
        """P and T that spend the budget with T / P = rho."""


def _positive(name: str, value: float) -> None:
    if not (value > 0 and math.isfinite(value)):
        raise ValueError(f"{name} should be positive and finite, not {value:g}")


@dataclass(frozen=True, slots=True)
class FlopBudget:
    """Floating-point operations, 6 P for each token."""

    amount: float
    unit: str = "FLOPs"

    def __post_init__(self) -> None:
        _positive("the budget", self.amount)

    def per_token(self, parameters: float) -> float:
        """6 P."""
        return 6 * parameters

    def split(self, rho: float) -> Split:
        """P = sqrt(C / (6 rho)), T = rho P."""
        _positive("rho", rho)
        parameters = math.sqrt(self.amount / (6 * rho))
        return Split(parameters, rho * parameters)


@dataclass(frozen=True, slots=True)
class TokenBudget:
    """A number of tokens to process, whatever the model."""

    amount: float
    unit: str = "tokens"

    def __post_init__(self) -> None:
        _positive("the budget", self.amount)

    def per_token(self, parameters: float) -> float:
        """1: a token costs a token."""
        return 1.0

    def split(self, rho: float) -> Split:
        """P = T / rho."""
        _positive("rho", rho)
        return Split(self.amount / rho, self.amount)


@dataclass(frozen=True)
class StepTimes:
    """Seconds of a training step against P, measured at a few sizes and straight in log-log between them.

    Beyond the measured sizes the outermost piece goes on. A power law c P^e is reproduced exactly.

    Attributes:
        measured: (P, seconds) of at least two sizes, ascending in P; three are recommended.
    """

    measured: tuple[tuple[float, float], ...]

    def __post_init__(self) -> None:
        sizes = [size for size, _ in self.measured]
        if len(sizes) < 2 or sizes != sorted(set(sizes)):
            raise ValueError("step times are needed at two or more different sizes, in ascending order")
        for size, seconds in self.measured:
            _positive("a size", size)
            _positive("a step time", seconds)

    def __call__(self, parameters: float) -> float:
        """Seconds of one step of a model with so many parameters."""
        x = math.log(parameters)
        points = [(math.log(size), math.log(seconds)) for size, seconds in self.measured]
        piece = next((i for i in range(1, len(points) - 1) if x < points[i][0]), len(points) - 1)
        (x0, y0), (x1, y1) = points[piece - 1], points[piece]
        return math.exp(y0 + (y1 - y0) * (x - x0) / (x1 - x0))


def bisect_log(f: Callable[[float], float], target: float, low: float = 1.0, high: float = 1e15) -> float:
    """Where a rising function reaches a target, by halving an interval of log x to the last bit.

    Raises:
        ValueError: the target lies outside f(low) .. f(high).
    """
    if not f(low) <= target <= f(high):
        raise ValueError(f"no size between {low:g} and {high:g} parameters spends the budget: {target:g}")
    a, b = math.log(low), math.log(high)
    while True:
        middle = (a + b) / 2
        if middle in (a, b):
            return math.exp(middle)
        if f(math.exp(middle)) < target:
            a = middle
        else:
            b = middle


@dataclass(frozen=True, slots=True)
class TimeBudget:
    """Seconds of wall-clock, what the paper compares.

    Attributes:
        amount: seconds.
        step_time: seconds of one step against P.
        batch_tokens: b, tokens of a step at which `step_time` was measured.
    """

    amount: float
    step_time: Callable[[float], float]
    batch_tokens: int
    unit: str = "seconds"

    def __post_init__(self) -> None:
        _positive("the budget", self.amount)
        _positive("batch_tokens", self.batch_tokens)

    def per_token(self, parameters: float) -> float:
        """Seconds of a step over its tokens."""
        return self.step_time(parameters) / self.batch_tokens

    def split(self, rho: float) -> Split:
        """The P with step_time(P) rho P / b = budget.

        Raises:
            ValueError: for a budget below one token of a model with one parameter.
        """
        _positive("rho", rho)
        parameters = bisect_log(lambda p: self.per_token(p) * rho * p, self.amount)
        return Split(parameters, rho * parameters)


def adjust(parameters: float, tokens: float, rho: float) -> Split:
    """An existing plan (P0, T0) at the same 6 P T and with T / P = rho: P = sqrt(P0 T0 / rho), T = rho P.

    Below rho the model was too large: it shrinks and runs longer. Above, it grows and runs shorter.
    """
    return FlopBudget(6 * parameters * tokens).split(rho)
