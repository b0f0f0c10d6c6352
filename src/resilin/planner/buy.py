"""Given data and compute, what to train: by a scaling law with its bands, by a rule, and what short data ask for."""

from __future__ import annotations

import csv
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from resilin.config import UserError
from resilin.planner.advice import short_number as n
from resilin.planner.bootstrap import Band, Bootstrapped
from resilin.planner.budget import FlopBudget, Split
from resilin.planner.family import FamilyCost
from resilin.planner.regularisers import Regularised, short_of_data
from resilin.planner.rho import PRACTICAL, Rho
from resilin.planner.scaling_law import Run, ScalingLaw, bootstrap_scaling_law

if TYPE_CHECKING:
    from rich.console import Console

COLUMNS = ("parameters", "tokens", "loss")
SHORT = 4.0  # epochs, beyond which repeated tokens are clearly worth less (arXiv 2305.16264)


@dataclass(frozen=True, slots=True)
class Purchase:
    """What a budget buys.

    Attributes:
        flops: the budget.
        unique: tokens there are.
        law: fitted to runs, where some were given.
        best: by the law.
        parameters: of the best, with its band.
        tokens: likewise.
        loss: likewise.
        rule: P and T by tokens per parameter.
        rho: of that rule.
        rule_loss: what the law says of the rule's choice.
        recipe: epochs, learning rate and weight decay, where the choice repeats its data.
    """

    flops: float
    unique: float
    law: Bootstrapped[ScalingLaw] | None
    best: Split | None
    parameters: Band | None
    tokens: Band | None
    loss: Band | None
    rule: Split
    rho: Rho
    rule_loss: Band | None
    recipe: Regularised | None

    @property
    def chosen(self) -> Split:
        """The law's, else the rule's."""
        return self.best or self.rule

    @property
    def epochs(self) -> float:
        """Of the chosen one; 0 where data are unlimited."""
        return self.chosen.tokens / self.unique


def read_runs(path: Path) -> list[Run]:
    """Finished runs from a CSV file with the columns parameters, tokens and loss (others are passed over).

    Raises:
        UserError: naming the line that is not as it should be.
    """
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None
    if not rows or any(name not in rows[0] for name in COLUMNS):
        raise UserError(f"{path}: its first line should name the columns {', '.join(COLUMNS)}, and runs should follow")
    found = []
    for number, row in enumerate(rows, 2):
        try:
            found.append(Run(*(float(row[name]) for name in COLUMNS)))
        except (TypeError, ValueError):
            said = ",".join(str(row[name]) for name in COLUMNS)
            raise UserError(f"{path}:{number}: {said}: parameters, tokens and loss are positive numbers") from None
    return found


def buy(flops: float, unique: float, rho: Rho, runs: list[Run], draws: int = 100, seed: int = 0) -> Purchase:
    """What to train.

    Args:
        flops: the budget, 6 P a token.
        unique: different tokens there are; inf: as many as anybody could ask for.
        rho: of the rule that is shown beside the law.
        runs: to fit a law to; []: only the rule.
        draws: resampled fits, for the bands.
        seed: of these.

    Raises:
        UserError: no law goes through the runs, or the budget is none.
    """
    if not unique > 0:
        raise UserError(f"there should be a positive number of tokens, not {unique:g}")
    try:
        rule = FlopBudget(flops).split(rho.value)
        law = bootstrap_scaling_law(runs, draws, seed) if runs else None
        best = parameters = tokens = loss = rule_loss = None
        if law is not None:

            def reached(one: ScalingLaw) -> float:
                split = one.best(flops, unique)
                return one.loss(split.parameters, split.tokens, unique)

            best = law.fit.best(flops, unique)
            parameters = law.band(lambda one: one.best(flops, unique).parameters)
            tokens = law.band(lambda one: one.best(flops, unique).tokens)
            loss = law.band(reached)
            rule_loss = law.band(lambda one: one.loss(rule.parameters, rule.tokens, unique))
    except ValueError as error:
        raise UserError(str(error)) from None
    chosen = best or rule
    recipe = short_of_data(chosen.parameters, unique) if chosen.tokens > SHORT * unique else None
    return Purchase(flops, unique, law, best, parameters, tokens, loss, rule, rho, rule_loss, recipe)


def _band(band: Band) -> str:
    return f"{n(band.value)} ({n(band.low)} to {n(band.high)})"


def tell(bought: Purchase, shares: tuple[float, ...], console: Console) -> None:
    """Print what was found.

    Args:
        bought: it.
        shares: sizes of a family's members, over the chosen one's; (): no family.
        console: to print on.
    """

    def say(line: str) -> None:
        console.print(line, highlight=False)

    data = "unlimited data" if math.isinf(bought.unique) else f"{n(bought.unique)} unique tokens"
    say(f"{n(bought.flops)} FLOPs, {data}")
    if bought.law is not None:
        law = bought.law.fit
        say(
            f"law: L = {law.floor:.4g} + {law.a:.4g} P^-{law.alpha:.4g} + {law.b:.4g} T^-{law.beta:.4g}, residuals "
            f"{law.residual:.2%}; alpha {bought.law.band(lambda one: one.alpha)}, "
            f"beta {bought.law.band(lambda one: one.beta)} (90 % of {len(bought.law.others)} resampled fits)"
        )
    if bought.parameters is not None and bought.tokens is not None:
        say(f"[bold]by the law[/bold]: P = {_band(bought.parameters)}, T = {_band(bought.tokens)}, loss {bought.loss}")
    rule_loss = f", loss by the law {bought.rule_loss}" if bought.rule_loss is not None else ""
    say(
        f"by rho = {bought.rho.value:.3g} ({bought.rho.source}): P = {n(bought.rule.parameters)}, "
        f"T = {n(bought.rule.tokens)}{rule_loss}"
    )
    if bought.epochs > 1:
        say(f"data are short: {bought.epochs:.3g} epochs of {n(bought.unique)} tokens")
    if bought.recipe is not None:
        recipe, member = bought.recipe, bought.recipe.of_member()
        where = "" if recipe.inside else "; beyond what was tuned there: the nearest"
        say(
            f"many epochs (arXiv 2509.14786{where}): about {recipe.epochs:.3g} epochs at weight decay "
            f"{recipe.weight_decay:.2g}, lr {recipe.lr:.2g}, and spend the rest on an ensemble of logits, each member "
            f"at {member.epochs:.3g} epochs and weight decay {member.weight_decay:.2g}"
        )
        passes = 6 * bought.chosen.parameters * bought.unique * member.epochs
        say(f"  {max(bought.flops / passes, 1):.3g} such members fit into the budget")
    if shares:
        sizes = tuple(sorted(share * bought.chosen.parameters for share in shares))
        family = FamilyCost(sizes, bought.chosen.tokens)
        say(
            f"a family of {', '.join(map(n, sizes))}: {n(family.separate)} FLOPs each alone, {n(family.nested)} nested "
            f"with one member a step ({family.nested / family.largest:.2f} of the largest alone), "
            f"{family.stored:.0%} of the parameters to keep"
        )


def rule_of(text: str) -> Rho:
    """Of `--rho`: a number, or auto."""
    if text == "auto":
        return Rho(PRACTICAL, "later scaling laws' value")
    try:
        return Rho(float(text), "as given")
    except ValueError:
        raise UserError(f"--rho {text}: should be auto or a positive number of tokens per parameter") from None
