"""Small runs that measure rho: three sizes at one cost, together 2 % of the budget."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from resilin.planner.budget import Budget, FlopBudget, TimeBudget, TokenBudget
from resilin.planner.family import Architecture, Family
from resilin.planner.rho import PILOT_RATIOS, PILOT_SHARE, PILOT_STEPS, Pilot
from resilin.run.build import build_run
from resilin.run.settings import RunSettings


def _share(budget: Budget) -> Budget | None:
    """What one pilot may spend; None for a budget of tokens, in which a bigger model costs nothing."""
    if isinstance(budget, FlopBudget | TimeBudget):
        return replace(budget, amount=budget.amount * PILOT_SHARE / len(PILOT_RATIOS))
    assert isinstance(budget, TokenBudget)
    return None


def plan_pilots(budget: Budget, family: Family, batch_tokens: int) -> list[tuple[Architecture, int]]:
    """The architectures and steps of the pilots; empty where the budget does not allow three different ones.

    A pilot needs 100 steps, and the three sizes must be different members of the family.
    """
    share = _share(budget)
    if share is None:
        return []
    found = []
    for ratio in PILOT_RATIOS:
        member = family.nearest(share.split(ratio).parameters)
        found.append((member, round(share.amount / share.per_token(member.parameters) / batch_tokens)))
    different = len({member.parameters for member, _ in found}) == len(PILOT_RATIOS)
    return found if different and all(steps >= PILOT_STEPS for _, steps in found) else []


def run_pilots(
    settings: RunSettings, family: Family, budget: Budget, batch_tokens: int, tell: Callable[[str], None]
) -> list[Pilot]:
    """Train the pilots and return what they reached; empty where the budget does not allow them.

    Args:
        settings: of the run, whose model and steps are replaced.
        family: to take members from.
        budget: of the whole plan.
        batch_tokens: b, of the settings' batch.
        tell: receives a line for each pilot.
    """
    plans = plan_pilots(budget, family, batch_tokens)
    if not plans:
        tell(f"no pilot runs: {PILOT_SHARE:.0%} of this budget does not pay for three sizes of {PILOT_STEPS} steps")
    found = []
    for member, steps in plans:
        train = settings.train.model_copy(update={"steps": steps})
        run = build_run(settings.model_copy(update={"model": member.settings, "train": train}))
        outcome = run.train()
        if outcome.reason != "completed":
            raise KeyboardInterrupt if outcome.reason == "interrupted" else RuntimeError(outcome.message)
        loss = outcome.metrics.get("validation/loss", outcome.metrics["loss"])
        tokens = float(steps * batch_tokens)
        pilot = Pilot(member.parameters, tokens, loss, cost=tokens * budget.per_token(member.parameters))
        tell(f"pilot {member.shape()}: T/P = {pilot.ratio:.3g}, {steps} steps, loss {loss:.4f}")
        found.append(pilot)
    return found
