"""`resilin chaos`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from resilin.cli.arguments import RunArguments
from resilin.cli.option_groups import with_option_groups


@with_option_groups
def chaos(
    given: RunArguments,
    kills: Annotated[int, typer.Option(min=0, help="How often something happens.")] = 10,
    kinds: Annotated[str, typer.Option(help="What may happen: kill, stop, drain, add; with commas.")] = "kill",
    chance: Annotated[int, typer.Option("--chance-seed", help="What and when is drawn from this.")] = 0,
    replay: Annotated[Path | None, typer.Option(help="A chaos.json: what happened then happens again.")] = None,
) -> None:
    """Train twice, in peace and under blows, and compare: steps lost, bits changed, time to recover.

    \b
    resilin chaos run.toml --workers 4 train.micro_batch_size=2 --kills 20 --chance-seed 7
    resilin chaos run.toml --workers 4 train.micro_batch_size=2 --replay runs/chaos/chaos.json
    """
    from rich.console import Console
    from rich.table import Table

    from resilin.cluster.local import worker_command
    from resilin.config import UserError, load_settings
    from resilin.run.chaos import blows_of, drawn, run_chaos
    from resilin.run.settings import RunSettings

    file, overrides = given.split()
    settings = load_settings(RunSettings, file, overrides)
    if settings.parallel.workers < 2:
        raise UserError("chaos needs workers that others can stand in for: --workers 2 or more")
    wanted = [kind.strip() for kind in kinds.split(",")]
    if unknown := [kind for kind in wanted if kind not in ("kill", "stop", "drain", "add")]:
        raise UserError(f"--kinds: {unknown[0]!r} is none of kill, stop, drain, add")
    folder = given.folder or Path("runs") / "chaos"
    if folder.exists():
        raise UserError(f"{folder}: is there already; choose another --folder")
    try:
        blows = blows_of(replay) if replay else drawn(chance, settings.train.steps, kills, wanted)  # type: ignore[arg-type]
    except ValueError as error:
        raise UserError(f"--replay: {error}") from None
    report, _, _ = run_chaos(settings, folder, worker_command(), blows)
    table = Table(show_header=False, box=None, pad_edge=False)
    rows = [
        ("blows", str(report.blows)),
        ("changes of the view", str(report.changes)),
        ("steps lost", str(report.steps_lost)),
        ("bits changed", "0" if not report.bits_changed else f"{report.bits_changed} values differ"),
        ("steps redone", str(report.redone)),
        ("from a kill to the next step", _spread(report.recovery)),
        ("until all had come out", _spread(report.halting)),
        ("until all went on", _spread(report.adopting)),
        ("seconds per step, to the quiet run's", f"{report.slowdown:.2f}x"),
    ]
    for name, value in rows:
        table.add_row(name, value)
    Console(highlight=False).print(table)
    typer.echo(f"wrote {folder / 'chaos.json'}")
    if report.ended:
        typer.secho(f"error: {report.ended}", fg=typer.colors.RED, err=True)
    if not report.good:
        raise typer.Exit(1)


def _spread(values: list[float]) -> str:
    if not values:
        return "-"
    middle = values[len(values) // 2]
    return f"{middle:.3f} s (median of {len(values)}; {values[0]:.3f} to {values[-1]:.3f} s)"
