"""`resilin plan budget`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def budget(
    runs: Annotated[
        Path | None, typer.Argument(metavar="[RUNS.csv]", help="Finished runs: columns parameters, tokens, loss.")
    ] = None,
    flops: Annotated[float, typer.Option(help="To spend, 6 P a token.", show_default=False)] = 0.0,
    unique: Annotated[float, typer.Option(help="Different tokens there are. Default: unlimited.")] = float("inf"),
    rho: Annotated[str, typer.Option(help="Tokens per parameter of the rule beside the law.")] = "auto",
    family: Annotated[str, typer.Option(help="Sizes of a nested family, over the chosen one: 0.125,0.25,0.5,1.")] = "",
    draws: Annotated[int, typer.Option(min=20, help="Resampled fits, for the bands.")] = 100,
    seed: Annotated[int, typer.Option(min=0, help="Of these.")] = 0,
) -> None:
    """Choose model size and tokens by a scaling law of your own runs, with its uncertainty.

    Fits L = E + A P^-alpha + B T^-beta, and says the size of least loss for
    the budget with bands from resampled fits, what the tokens-per-parameter
    rule would take, and, where data are short, epochs, weight decay and
    members of an ensemble.

    \b
    resilin plan budget runs.csv --flops 1e21
    resilin plan budget runs.csv --flops 1e21 --unique 1e9 --family 0.25,0.5,1
    resilin plan budget --flops 1e20 --rho 20
    """
    from rich.console import Console

    from resilin.config import UserError
    from resilin.planner.buy import buy, read_runs, rule_of, tell
    from resilin.planner.long_run.choose import numbers

    if not flops:
        raise UserError("give a budget: --flops 1e21")
    bought = buy(flops, unique, rule_of(rho), read_runs(runs) if runs is not None else [], draws, seed)
    tell(bought, tuple(numbers("--family", family)) if family else (), Console())
