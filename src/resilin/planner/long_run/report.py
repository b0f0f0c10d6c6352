"""A study in the terminal and as JSON: what became of the run, way by way."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from resilin.planner.advice import short_number
from resilin.planner.long_run.study import Line, Study
from resilin.planner.report import short_time

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

PARTS = ("slower", "again", "saving", "stopped", "standing")


def _share(seconds: float, whole: float) -> str:
    share = 100 * seconds / whole
    return "" if not seconds else f"{share:.2g}" if abs(share) < 10 else f"{share:.0f}"


def results(line: Line, study: Study) -> list[str]:
    """A way's line of the first table."""
    outcome, cluster = line.outcome, study.settings.cluster
    return [
        line.name,
        f"{100 * outcome.goodput:.2f} %",
        short_time(outcome.seconds) if outcome.finished else f"not in {short_time(outcome.seconds)}",
        f"{outcome.losses}",
        f"{outcome.restarts}" if outcome.restarts else "",
        short_number(line.cost) if cluster.price else "",
        short_number(line.energy) if cluster.watts else "",
    ]


def shares(line: Line) -> list[str]:
    """A way's line of the second table: where the time that was not useful went, in per cent of all."""
    return [line.name, *(_share(getattr(line.outcome, part), line.outcome.seconds) for part in PARTS)]


RESULTS = ("way", "goodput", "time", "losses", "restarts", "cost", "kWh")
SHARES = ("% of the time", *PARTS)


def report(study: Study, console: Console) -> None:
    """Print a study's table and what it was of."""
    settings = study.settings
    spares = f" and {settings.cluster.spares} spare ones" if settings.cluster.spares else ""
    console.print(
        f"{settings.cluster.machines} machines{spares}, {settings.workers} workers: {settings.job.stages} stages of "
        f"{settings.replicas} replicas; {settings.steps:,.0f} steps of {short_time(settings.job.step_seconds)}, "
        f"{short_time(study.plain)} if nothing happened"
    )
    where = f"from {settings.trace}" if settings.trace else f"drawn with seed {settings.seed}"
    console.print(f"{len(study.trace):,} events in {short_time(study.trace.seconds)}, {where}")
    best = max(study.lines, key=lambda line: (line.outcome.finished, line.outcome.goodput))
    at = study.lines.index(best)
    console.print(_table(RESULTS, [results(line, study) for line in study.lines], at))
    console.print(_table(SHARES, [shares(line) for line in study.lines], at))
    console.print(
        "slower: fewer or slower machines computed; again: computed, lost, and computed again; stopped: noticing, "
        "joining, restarting; standing: too few machines were there"
    )


def _table(head: Sequence[str], lines: Sequence[Sequence[str]], best: int) -> Table:
    """Columns that nothing stands in are left out."""
    from rich import box
    from rich.table import Table

    kept = [at for at in range(len(head)) if any(line[at] for line in lines)]
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for at in kept:
        table.add_column(head[at], justify="right" if at else "left", no_wrap=True)
    for number, line in enumerate(lines):
        table.add_row(*(line[at] for at in kept), style="bold green" if number == best else None)
    return table


def json_of(study: Study) -> dict[str, Any]:
    """As JSON values."""
    return {
        "settings": study.settings.model_dump(mode="json"),
        "plain_seconds": study.plain,
        "events": len(study.trace),
        "ways": [
            {
                "name": line.name,
                "interval": line.course.interval if line.course.interval < float("inf") else None,
                "goodput": line.outcome.goodput,
                "cost": line.cost,
                "kwh": line.energy,
                **asdict(line.outcome),
            }
            for line in study.lines
        ],
    }
