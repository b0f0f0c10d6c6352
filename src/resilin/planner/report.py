"""A plan in the terminal: the table of candidates, the chosen one, and what to do next."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from resilin.planner.advice import short_number
from resilin.planner.one_epoch import Plan
from resilin.planner.rows import Row

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table


def short_time(seconds: float) -> str:
    """Seconds as a person says them."""
    for size, unit in ((86400.0, "d"), (3600.0, "h"), (60.0, "min")):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds:.3g} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"


def cells(row: Row, plan: Plan) -> list[str]:
    """One line of the table."""
    mark = "->" if row == plan.chosen else ""
    return [
        mark,
        row.architecture.shape(),
        short_number(row.architecture.parameters),
        short_number(row.architecture.total),
        "" if row.step_seconds is None else short_time(row.step_seconds),
        f"{row.steps:,}",
        short_number(row.tokens),
        f"{row.ratio:.3g}",
        "" if plan.data.available is None else f"{row.epochs:.3g}",
        "" if row.predicted_loss is None else f"{row.predicted_loss:.4g}",
        ", ".join(row.flags),
    ]


HEAD = (
    "",
    "shape",
    "P",
    "total",
    "step",
    "steps",
    "T",
    "T/P",
    "epochs",
    "predicted loss",
    "flags",
)


def table(plan: Plan) -> Table:
    """The candidates; columns that nothing is known for are left out."""
    from rich import box
    from rich.table import Table

    lines = [cells(row, plan) for row in plan.rows]
    kept = [i for i in range(len(HEAD)) if i == 0 or any(line[i] for line in lines)]
    title = f"Candidates for {short_number(plan.budget.amount)} {plan.budget.unit}"
    made = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for i in kept:
        left = HEAD[i] in ("", "flags")
        made.add_column(HEAD[i], justify="left" if left else "right", no_wrap=not left)
    for row, line in zip(plan.rows, lines, strict=True):
        made.add_row(*(line[i] for i in kept), style="bold green" if row == plan.chosen else None)
    return made


def report(plan: Plan, notes: tuple[str, ...], overrides: tuple[str, ...], console: Console) -> None:
    """Print a plan.

    Args:
        plan: to print.
        notes: further sentences, of whoever prepared it.
        overrides: further settings that belong to it.
        console: to print on.
    """
    chosen, unique = plan.chosen, plan.data.unique
    console.print(table(plan))
    data = "unlimited unique tokens" if math.isinf(unique) else f"{short_number(unique)} unique tokens"
    console.print(f"rho = {plan.rho.value:.3g} tokens per parameter ({plan.rho.source}); {data}")
    once = "every token once" if plan.one_epoch else f"{chosen.epochs:.3g} epochs"
    console.print(
        f"[bold]Plan[/bold]: {chosen.architecture.shape()}, P = {chosen.architecture.parameters:,} "
        f"({chosen.architecture.total:,} with embeddings), {chosen.steps:,} steps of {plan.batch_tokens:,} tokens, "
        f"T = {short_number(chosen.tokens)}, T/P = {chosen.ratio:.3g}, {once}, dropout {plan.dropout:g}"
    )
    for warning in plan.warnings:
        console.print(f"[yellow]warning:[/yellow] {warning}")
    for note in notes:
        console.print(f"note: {note}")
    console.print("Train it with these overrides:")
    console.print("  " + " ".join((*plan.settings(), *overrides)), highlight=False, soft_wrap=True)
