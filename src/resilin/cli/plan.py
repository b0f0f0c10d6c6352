"""`resilin plan`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from resilin.cli.arguments import split_settings


def plan(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[SETTINGS.toml] [KEY=VALUE]...",
            help="A run's settings, whose model gives the family its proportions. Default: 12 layers of width 768.",
        ),
    ] = None,
    flops: Annotated[float | None, typer.Option(help="Budget: floating-point operations, 6 P a token.")] = None,
    hours: Annotated[float | None, typer.Option(help="Budget: wall-clock; steps are timed here at 3 sizes.")] = None,
    tokens: Annotated[float | None, typer.Option(help="Budget: tokens to process.")] = None,
    adjust: Annotated[bool, typer.Option("--adjust", help="Budget: what the settings' own run costs.")] = False,
    available_tokens: Annotated[
        float | None, typer.Option(help="Unique tokens there are. Default: counted in the settings' source.")
    ] = None,
    duplicate_rate: Annotated[
        float | None, typer.Option(help="Share of them that repeats other parts. Default: estimated from the source.")
    ] = None,
    rho: Annotated[str, typer.Option(help="Tokens per parameter to aim for: a number, or auto.")] = "auto",
    faithful: Annotated[bool, typer.Option("--faithful", help="auto: the paper's 5 instead of the later 20.")] = False,
    pilots: Annotated[bool, typer.Option("--pilots", help="auto: train 3 small runs for 2% of the budget.")] = False,
    fit: Annotated[
        list[Path] | None, typer.Option(help="A run folder whose loss curve predicts losses; may be repeated.")
    ] = None,
    watch: Annotated[
        Path | None, typer.Option(help="A run folder: print the power law of its loss so far instead of planning.")
    ] = None,
    floor: Annotated[bool, typer.Option("--floor", help="Fit loss curves with an irreducible part.")] = False,
    batch_tokens: Annotated[int | None, typer.Option(help="b, tokens of a step. Default: the settings' batch.")] = None,
    keep_dropout: Annotated[bool, typer.Option("--keep-dropout", help="Do not set dropout to 0.")] = False,
) -> None:
    """Choose model size, steps and data together, so that every token is used once.

    Prints the candidate sizes with T/P, epochs and flags, the chosen one,
    how much data to ask for where it is short, and the overrides that train
    it. P counts parameters without embeddings, T tokens; rho is the T/P to
    aim for.

    \b
    resilin plan --flops 1e18 --available-tokens 5e8
    resilin plan run.toml --hours 2
    resilin plan run.toml --adjust --rho 5
    resilin plan run.toml --flops 1e15 --fit runs/small --fit runs/large
    resilin plan --watch runs/small
    """
    from rich.console import Console

    from resilin.config.errors import UserError

    console = Console()
    if watch is not None:
        from resilin.planner.watch import watch_run

        watch_run(watch, lambda line: console.print(line, highlight=False), floor)
        return
    file, overrides = split_settings(arguments or [])
    if sum(budget is not None for budget in (flops, hours, tokens)) + adjust != 1:
        raise UserError("give one budget: --flops 1e18, --hours 2, --tokens 1e9, or --adjust with a settings file")
    from resilin.planner.report import report
    from resilin.planner.request import PlanRequest, answer_request

    request = PlanRequest(
        file=file,
        overrides=tuple(overrides),
        flops=flops,
        hours=hours,
        tokens=tokens,
        available_tokens=available_tokens,
        duplicate_rate=duplicate_rate,
        rho=rho,
        mode="faithful" if faithful else "practical",
        pilots=pilots,
        fits=tuple(fit or ()),
        floor=floor,
        batch_tokens=batch_tokens,
        keep_dropout=keep_dropout,
    )
    answer = answer_request(request, adjust, lambda line: console.print(line, highlight=False))
    report(answer.plan, answer.notes, answer.overrides, console)
