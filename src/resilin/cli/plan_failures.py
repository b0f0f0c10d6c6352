"""`resilin plan failures`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from resilin.cli.arguments import split_settings


def failures(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[STUDY.toml] [KEY=VALUE]...",
            help="Cluster, job, checkpoints, failures, ways to go on; in its place --layout.",
            show_default=False,
        ),
    ] = None,
    layout: Annotated[
        Path | None, typer.Option(help="Settings of a run, such as `resilin plan --write` writes: makes the study.")
    ] = None,
    cluster: Annotated[str, typer.Option(help="With --layout: the machine, a name or a .toml file.")] = "",
    losses_a_day: Annotated[
        float | None, typer.Option(min=0.0001, help="With --layout: machines that fail each day, of all together.")
    ] = None,
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
    resilin plan failures --layout planned.toml --cluster dgx-a100-40 --losses-a-day 1
    """
    import json

    from rich.console import Console

    from resilin.config import UserError, load_settings
    from resilin.planner.long_run import study
    from resilin.planner.long_run.choose import chosen, numbers, with_machine
    from resilin.planner.long_run.from_layout import study_of_layout
    from resilin.planner.long_run.picture import curves, timeline
    from resilin.planner.long_run.report import json_of, report
    from resilin.planner.long_run.settings import StudySettings
    from resilin.planner.long_run.sweep import Quantity, curves_of, sweep
    from resilin.planner.report import short_time

    file, overrides = split_settings(arguments or [])
    console = Console()
    if layout is not None:
        if file is not None or not cluster:
            raise UserError("--layout FILE goes with --cluster MACHINE, and without a study's file")
        made_of = study_of_layout(layout, cluster, overrides, losses_a_day, lambda line: typer.echo(line, err=True))
        loaded, name = made_of.study, layout.name
        notes = (f"{made_of.step.plan}: {short_time(made_of.step.seconds)} a step", *made_of.notes)
    elif file is None or cluster or losses_a_day is not None:
        raise UserError(
            "name a study: resilin plan failures examples/long-run.toml; or a layout: --layout FILE --cluster MACHINE"
        )
    else:
        loaded, name, notes = load_settings(StudySettings, file, overrides), file.name, ()
    settings = chosen(with_machine(loaded), way or ())
    if not as_json:
        for note in notes:
            console.print(note, highlight=False)
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
            curves(curves_of(found), picture, label, f"{settings.job.step_seconds:g} s steps, {name}")
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
