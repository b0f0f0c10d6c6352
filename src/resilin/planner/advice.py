"""What a user should be told about a plan, one sentence each."""

from __future__ import annotations

from resilin.planner.budget import Budget, Split
from resilin.planner.repeats import effective_tokens
from resilin.planner.rho import Rho
from resilin.planner.rows import OVER_SIZED, UNDER_SIZED, Data, Row

FEW_STEPS = 10  # below, rounding to whole steps misses the budget by more than 5 %


def short_number(value: float) -> str:
    """A large number with three digits and a suffix."""
    for size, suffix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if 0.9995 * size <= value < 1e15:  # what rounds to 1000 of a unit is 1 of the next
            return f"{value / size:.3g}{suffix}"
    return f"{value:.3g}"


def warnings_of(chosen: Row, budget: Budget, rho: Rho, ideal: Split, batch_tokens: int, data: Data) -> list[str]:
    """Everything about a chosen row that is not as it should be.

    Args:
        chosen: the row.
        budget: what it spends.
        rho: the rule.
        ideal: what the rule asks for before rounding.
        batch_tokens: b.
        data: the corpus.
    """
    found = []
    n = short_number
    if chosen.epochs > 1:
        worth = effective_tokens(chosen.tokens, data.unique)
        found.append(
            f"tokens repeat: {n(chosen.tokens)} tokens over {n(data.unique)} unique ones are {chosen.epochs:.3g} "
            f"epochs; get {n(chosen.tokens - data.unique)} more tokens to use each once. Predicted cost: they act like "
            f"{n(worth)} fresh tokens, {1 - worth / chosen.tokens:.1%} of the budget is lost (arXiv 2305.16264)"
        )
    if ideal.tokens > data.unique:
        found.append(
            f"data, not compute, is the limit: the rule asks for {n(ideal.tokens)} unique tokens and "
            f"{n(data.unique)} are there; get {n(ideal.tokens - data.unique)} more, or plan for many epochs with "
            f"strong weight decay and ensembles instead (arXiv 2509.14786)"
        )
    if OVER_SIZED in chosen.flags or UNDER_SIZED in chosen.flags:
        word = "below a quarter" if OVER_SIZED in chosen.flags else "above four times"
        wanted = rho.value * chosen.architecture.parameters
        found.append(
            f"T/P is {chosen.ratio:.3g}, {word} of rho ({rho.value:.3g}): the rule asks for {n(wanted)} tokens"
        )
    if data.duplicate_rate > 0.01:
        found.append(f"about {data.duplicate_rate:.1%} of the corpus repeats other parts of it: not counted as data")
    error = abs(chosen.spent / budget.amount - 1)
    if error > 0.05:
        affordable = chosen.tokens / chosen.spent * budget.amount
        found.append(
            f"{chosen.steps} whole steps miss the budget by {error:.0%}: use a batch of at most "
            f"{n(max(1.0, affordable / FEW_STEPS))} tokens instead of {n(batch_tokens)}"
        )
    return found
