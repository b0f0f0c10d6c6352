"""`resilin plan failures`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from resilin.cli.arguments import split_settings


def failures(
    arguments: Annotated[
        list[str],
        typer.Argument(
            metavar="STUDY.toml [KEY=VALUE]...",
            help="Cluster, job, checkpoints, failures, ways to go on.",
            show_default=False,
        ),
    ],
    way: Annotated[list[str] | None, typer.Option(help="Only this one of the ways; may be repeated.")] = None,
    rates: Annotated[
        str, typer.Option(help="Sweep: everything happens so many times as often, such as 0.1,1,10.", metavar="NUMBERS")
    ] = "",
    sizes: Annotated[
        str, typer.Option(help="Sweep: so many machines compute, such as 128,1024,12500.", metavar="NUMBERS")
    ] = "",
    picture: Annotated[
        Path | None, typer.Option(help="Draw it: of one study the runs over time, of a sweep goodput (svg, png, pdf).")
    ] = None,
    write_trace: Annotated[Path | None, typer.Option(help="Write the failures, to be read with trace = ....")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="All figures, as JSON.")] = False,
) -> None:
    """Simulate a long run on machines that fail, way by way to go on.

    Draws failures from the file's laws (or reads a trace), plays every way
    against the same ones, and tells goodput, time, cost and energy. Nothing
    is started.

    \b
    resilin plan failures examples/long-run.toml
    resilin plan failures examples/long-run.toml --picture run.svg
    resilin plan failures examples/long-run.toml failures.machine.mean_hours=720
    resilin plan failures examples/long-run.toml --sizes 128,1024,12512 --picture sizes.svg
    """
    import json

    from rich.console import Console

    from resilin.config import UserError, load_settings
    from resilin.planner.long_run import study
    from resilin.planner.long_run.choose import chosen, numbers, with_machine
    from resilin.planner.long_run.picture import curves, timeline
    from resilin.planner.long_run.report import json_of, report
    from resilin.planner.long_run.settings import StudySettings
    from resilin.planner.long_run.sweep import Quantity, curves_of, sweep

    file, overrides = split_settings(arguments)
    if file is None:
        raise UserError("name a study: resilin plan failures examples/long-run.toml")
    settings = chosen(with_machine(load_settings(StudySettings, file, overrides)), way or ())
    console = Console()
    if rates and sizes:
        raise UserError("give one sweep: --rates or --sizes")
    if rates or sizes:
        if write_trace is not None:
            raise UserError("--write-trace writes the failures of one study: leave out --rates and --sizes")
        quantity: Quantity = "rate" if rates else "machines"
        found = sweep(settings, quantity, numbers("--rates" if rates else "--sizes", rates or sizes))
        if as_json:
            typer.echo(json.dumps([{quantity: value, **json_of(one)} for value, one in found], indent=1))
        else:
            for _, one in found:
                report(one, console)
        if picture is not None:
            label = "failures, over those of the study" if rates else "machines"
            curves(curves_of(found), picture, label, f"{settings.job.step_seconds:g} s steps, {file.name}")
            _wrote(picture, as_json)
        return
    made = study(settings, diaries=picture is not None)
    if as_json:
        typer.echo(json.dumps(json_of(made), indent=1))
    else:
        report(made, console)
    if write_trace is not None:
        made.trace.write(write_trace)
        _wrote(write_trace, as_json)
    if picture is not None:
        timeline(made, picture)
        _wrote(picture, as_json)


def _wrote(path: Path, quietly: bool) -> None:
    typer.echo(f"wrote {path}", err=quietly)
