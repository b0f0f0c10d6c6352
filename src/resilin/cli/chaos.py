"""`resilin chaos`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from resilin.cli.arguments import RunArguments
from resilin.cli.option_groups import with_option_groups

if TYPE_CHECKING:
    from rich.table import Table

    from resilin.run.chaos_report import Recovery, Report


@with_option_groups
def chaos(
    given: RunArguments,
    kills: Annotated[int, typer.Option(min=0, help="How often something happens.")] = 10,
    kinds: Annotated[
        str, typer.Option(help="What may happen: kill, stop, slow, partition, drain, add; with commas.")
    ] = "kill",
    chance: Annotated[int, typer.Option("--chance-seed", help="What and when is drawn from this.")] = 0,
    replay: Annotated[Path | None, typer.Option(help="A chaos.json: what happened then happens again.")] = None,
) -> None:
    """Train twice, in peace and under blows, and compare: steps lost, bits changed, time to recover.

    \b
    resilin chaos run.toml --workers 4 train.micro_batch_size=2 --kills 20 --chance-seed 7
    resilin chaos run.toml --workers 4 train.micro_batch_size=2 --kinds kill,slow,partition cluster.silence=2
    resilin chaos run.toml --workers 4 train.micro_batch_size=2 --replay runs/chaos/chaos.json
    """
    from rich.console import Console

    from resilin.cluster.isolation import can_isolate
    from resilin.cluster.local import worker_command
    from resilin.config import UserError, load_settings
    from resilin.run.blows import KINDS, blows_of, drawn
    from resilin.run.chaos import run_chaos
    from resilin.run.settings import RunSettings

    file, overrides = given.split()
    settings = load_settings(RunSettings, file, overrides)
    if settings.parallel.workers < 2:
        raise UserError("chaos needs workers that others can stand in for: --workers 2 or more")
    wanted = [kind.strip() for kind in kinds.split(",")]
    if unknown := [kind for kind in wanted if kind not in KINDS]:
        raise UserError(f"--kinds: {unknown[0]!r} is none of {', '.join(KINDS)}")
    folder = given.folder or Path("runs") / "chaos"
    if folder.exists():
        raise UserError(f"{folder}: is there already; choose another --folder")
    cluster = settings.cluster
    try:
        blows = (
            blows_of(replay)
            if replay
            else drawn(
                chance,
                settings.train.steps,
                kills,
                [kind for kind in KINDS if kind in wanted],
                silence=cluster.silence,
                many=cluster.copies,
            )
        )
    except ValueError as error:
        raise UserError(f"--replay: {error}") from None
    if any(blow.what == "partition" for blow in blows) and not can_isolate():
        raise UserError("partition: workers can be cut off on Linux only; leave it out of --kinds")
    report, _, _ = run_chaos(settings, folder, worker_command(), blows)
    Console(highlight=False).print(_summary(report))
    for one in report.recoveries:
        typer.echo("\n".join(_about(one)))
    typer.echo(f"wrote {folder / 'chaos.json'}")
    for member, why in report.falsely_lost:
        typer.secho(f"error: worker {member} {why}, though nothing fatal was done to it", fg=typer.colors.RED, err=True)
    if report.ended:
        typer.secho(f"error: {report.ended}", fg=typer.colors.RED, err=True)
    if not report.good:
        raise typer.Exit(1)


def _summary(report: Report) -> Table:
    from rich.table import Table

    table = Table(show_header=False, box=None, pad_edge=False)
    rows = [
        ("blows", ", ".join(f"{count} {kind}" for kind, count in report.blows.items()) or "none"),
        ("changes of the view", str(report.changes)),
        ("steps lost", str(report.steps_lost)),
        ("bits changed", "0" if not report.bits_changed else f"{report.bits_changed} values differ"),
        ("workers given up wrongly", str(len(report.falsely_lost))),
        ("steps redone", str(report.redone)),
        *((f"from a {kind} to the next step", _spread(times)) for kind, times in report.recovery.items()),
        ("until all had come out", _spread(report.halting)),
        ("until all went on", _spread(report.adopting)),
        ("seconds per step, to the quiet run's", f"{report.slowdown:.2f}x"),
    ]
    if report.throughput is not None:
        before, after = report.throughput
        rows.append(("steps a second, before and after blows", f"{before:.2f} and {after:.2f} (medians)"))
    for name, value in rows:
        table.add_row(name, value)
    return table


def _about(one: Recovery) -> list[str]:
    """A blow, and what was done about it, in lines."""
    hit = f"worker{'s' if len(one.members) > 1 else ''} {', '.join(map(str, one.members))}"
    pace = " and ".join("-" if rate is None else f"{rate:.1f}" for rate in (one.before, one.after))
    after = "no step after it" if one.seconds is None else f"the next step {one.seconds:.2f} s later"
    lines = [f"after step {one.step}: {one.what}, {hit}; {after}; {pace} steps a second before and after"]
    for change in one.changes:
        counts = f"{change['kept']} micro-batches kept, {change['redone']} steps redone, "
        counts += f"{change['shards_moved']} shards moved"
        lines.append(f"  {change['why']}; out in {change['halting']:.3f} s, on in {change['adopting']:.3f} s; {counts}")
    return lines if one.changes else [*lines, "  nothing had to change"]


def _spread(values: list[float]) -> str:
    if not values:
        return "-"
    middle = values[len(values) // 2]
    return f"{middle:.3f} s (median of {len(values)}; {values[0]:.3f} to {values[-1]:.3f} s)"
