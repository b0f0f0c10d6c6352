"""What a budget buys each architecture: the lines of the plan table.

P: parameters without embeddings. T: tokens processed. b: tokens of a step. I = T / b: steps. D: unique tokens there
are. E = T / D: epochs. rho: the T / P to aim for.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from resilin.planner.budget import Budget
from resilin.planner.family import Architecture
from resilin.planner.power_law import PowerLaw
from resilin.planner.repeats import effective_tokens, unique_tokens

OVER_SIZED, UNDER_SIZED, REPEATS, NEEDS_DATA = "over-sized", "under-sized", "repeats", "needs more data"


@dataclass(frozen=True, slots=True)
class Data:
    """The corpus.

    Attributes:
        available: tokens there are; None: as many as anybody could ask for.
        duplicate_rate: share of them that repeats another part of the corpus (hidden epochs).
    """

    available: float | None = None
    duplicate_rate: float = 0.0

    @property
    def unique(self) -> float:
        """D: infinite where nothing is known to limit it."""
        return math.inf if self.available is None else unique_tokens(self.available, self.duplicate_rate)


@dataclass(frozen=True, slots=True)
class Row:
    """One architecture and what the budget buys it.

    Attributes:
        architecture: of the family.
        steps: I, whole.
        tokens: T = I b.
        spent: of the budget, in its unit.
        step_seconds: of one step, where times were measured.
        epochs: E = T / D; 0 for unlimited data.
        predicted_loss: at the end, where a law was fitted; repeated tokens count for what they are worth.
        flags: of over-sized (T/P < rho/4), under-sized (T/P > 4 rho), repeats (E > 1), needs more data (rho P > D).
    """

    architecture: Architecture
    steps: int
    tokens: int
    spent: float
    step_seconds: float | None
    epochs: float
    predicted_loss: float | None
    flags: tuple[str, ...]

    @property
    def ratio(self) -> float:
        """T / P."""
        return self.tokens / self.architecture.parameters


Laws = Mapping[float, PowerLaw]
"""Fitted laws of the loss over *tokens*, by the P of the model they were fitted to."""


def predict(laws: Laws, parameters: float, tokens: float) -> float | None:
    """The loss of P parameters after T fresh tokens, straight in log-log between the sizes that have laws.

    None outside the measured sizes: a law of one size says nothing of another far away (a tenth is near).
    """
    sizes = sorted(laws)
    near = [size for size in sizes if abs(math.log(size / parameters)) < math.log(1.1)]
    if near:
        return laws[min(near, key=lambda size: abs(math.log(size / parameters)))].loss(tokens)
    below = [size for size in sizes if size < parameters]
    above = [size for size in sizes if size > parameters]
    if not below or not above:
        return None
    low, high = below[-1], above[0]
    share = math.log(parameters / low) / math.log(high / low)
    return math.exp((1 - share) * math.log(laws[low].loss(tokens)) + share * math.log(laws[high].loss(tokens)))


def row_of(architecture: Architecture, budget: Budget, rho: float, batch_tokens: int, data: Data, laws: Laws) -> Row:
    """The row of one architecture: the whole number of steps nearest to what the budget pays for, at least one."""
    per_token = budget.per_token(architecture.parameters)
    steps = max(1, round(budget.amount / per_token / batch_tokens))
    tokens = steps * batch_tokens
    epochs = tokens / data.unique
    ratio = tokens / architecture.parameters
    flags = [
        (OVER_SIZED, ratio < rho / 4),
        (UNDER_SIZED, ratio > 4 * rho),
        (REPEATS, epochs > 1),
        (NEEDS_DATA, rho * architecture.parameters > data.unique),
    ]
    worth = effective_tokens(tokens, data.unique) if epochs > 1 else tokens
    return Row(
        architecture=architecture,
        steps=steps,
        tokens=tokens,
        spent=tokens * per_token,
        step_seconds=per_token * batch_tokens if budget.unit == "seconds" else None,
        epochs=epochs,
        predicted_loss=predict(laws, architecture.parameters, worth),
        flags=tuple(name for name, applies in flags if applies),
    )
