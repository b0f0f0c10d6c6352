"""Planning a run in which every token is used once (Komatsuzaki, "One Epoch Is All You Need", arXiv 1906.06669).

The plan spends its budget on the architecture of a family whose T / P (tokens per parameter, without embeddings)
comes nearest to rho among those that need no token twice; where data are too few for all of them, it takes the one
with the fewest epochs and says how many tokens to ask for.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from resilin.planner.advice import warnings_of
from resilin.planner.budget import Budget, FlopBudget, Split
from resilin.planner.family import Architecture, Family
from resilin.planner.rho import Rho
from resilin.planner.rows import Data, Laws, Row, row_of

SPAN = 64.0  # the table lists architectures whose T / P is within this factor of rho


@dataclass(frozen=True, slots=True)
class Plan:
    """A planned run and the rows it was chosen from.

    Attributes:
        budget: what is spent.
        rho: the rule.
        ideal: P and T before rounding to an architecture and whole steps.
        batch_tokens: b.
        data: the corpus.
        rows: the candidates, by size.
        chosen: one of them.
        dropout: 0, unless the user insisted on another.
        warnings: what the user should know, one sentence each.
    """

    budget: Budget
    rho: Rho
    ideal: Split
    batch_tokens: int
    data: Data
    rows: tuple[Row, ...]
    chosen: Row
    dropout: float
    warnings: tuple[str, ...]

    @property
    def one_epoch(self) -> bool:
        """Whether every token is used at most once."""
        return self.chosen.epochs <= 1

    def settings(self) -> tuple[str, ...]:
        """The plan as overrides for `resilin train`, the batch left as it is."""
        return (
            *self.chosen.architecture.overrides(),
            f"model.dropout={self.dropout:g}",
            f"train.steps={self.chosen.steps}",
        )


def _candidates(family: Family, budget: Budget, rho: float, ideal: Architecture) -> list[Architecture]:
    """The members within SPAN of rho, and always the ideal one and its neighbours."""
    place = family.members.index(ideal)
    wanted = []
    for i, member in enumerate(family.members):
        ratio = budget.amount / budget.per_token(member.parameters) / member.parameters
        if abs(i - place) <= 1 or abs(math.log(ratio / rho)) <= math.log(SPAN):
            wanted.append(member)
    return wanted


def _choose(rows: list[Row], rho: float, keep: Architecture | None) -> Row:
    def distance(row: Row) -> float:
        return abs(math.log(row.ratio / rho))

    fresh = [row for row in rows if row.epochs <= 1]
    if not fresh:
        return min(rows, key=lambda row: (row.epochs, distance(row)))
    kept = next((row for row in fresh if row.architecture == keep), None)
    if kept is None:
        return min(fresh, key=distance)

    def slack(row: Row) -> float:
        # Rounding to whole steps moves a ratio by half a step, in the plan before and in this one.
        return 1 / kept.steps + 1.5 / row.steps

    better = [
        row for row in fresh if distance(row) + slack(row) < distance(kept) and row.epochs * math.exp(slack(row)) <= 1
    ]
    return min(better, key=distance, default=kept)


def make_plan(
    budget: Budget,
    family: Family,
    rho: Rho,
    batch_tokens: int,
    data: Data | None = None,
    *,
    laws: Laws | None = None,
    keep: Architecture | None = None,
    dropout: float | None = None,
) -> Plan:
    """The best plan for a budget, with the table it was chosen from.

    Args:
        budget: FLOPs, seconds or tokens.
        family: the architectures to choose from.
        rho: tokens per parameter to aim for.
        batch_tokens: b, tokens of one step.
        data: the corpus; None: unlimited.
        laws: fitted losses over tokens by P, for predicted losses.
        keep: the architecture of an existing plan, which stays unless another is clearly nearer.
        dropout: a rate the user insists on; None: 0, since nothing can be over-fitted that is seen once.

    Raises:
        ValueError: a budget or batch that is not positive.
    """
    if batch_tokens < 1:
        raise ValueError(f"batch_tokens should be at least 1, not {batch_tokens}")
    data = data or Data()
    ideal = budget.split(rho.value)
    members = _candidates(family, budget, rho.value, family.nearest(ideal.parameters))
    rows = [row_of(member, budget, rho.value, batch_tokens, data, laws or {}) for member in members]
    chosen = _choose(rows, rho.value, keep)
    warnings = warnings_of(chosen, budget, rho, ideal, batch_tokens, data)
    if dropout:
        warnings.append(
            f"dropout {dropout:g} is kept as insisted on: with tokens seen once it only slows the training down"
        )
    return Plan(budget, rho, ideal, batch_tokens, data, tuple(rows), chosen, dropout or 0.0, tuple(warnings))


def adjust_plan(
    architecture: Architecture,
    steps: int,
    family: Family,
    rho: Rho,
    batch_tokens: int,
    data: Data | None = None,
    *,
    laws: Laws | None = None,
    dropout: float | None = None,
) -> Plan:
    """An existing plan (P0, I0) divided anew at the same 6 P T; applied to its own result it changes nothing.

    Args:
        architecture: of the existing plan.
        steps: its I0.
        family: to choose the new architecture from.
        rho: tokens per parameter to aim for.
        batch_tokens: b of both plans.
        data: the corpus.
        laws: fitted losses over tokens by P.
        dropout: a rate the user insists on.
    """
    budget = FlopBudget(6.0 * architecture.parameters * steps * batch_tokens)
    return make_plan(budget, family, rho, batch_tokens, data, laws=laws, keep=architecture, dropout=dropout)
