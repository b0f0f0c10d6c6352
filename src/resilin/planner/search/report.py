"""Layouts in the terminal: the best few with what binds them, the Pareto set, or what is missing."""

from __future__ import annotations

from typing import TYPE_CHECKING

from resilin.models.flops import parameter_counts
from resilin.planner.advice import short_number
from resilin.planner.report import short_time
from resilin.planner.search.find import Choice, usable
from resilin.planner.search.request import LayoutAnswer, overrides_of

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table


def gigabytes(count: float) -> str:
    """Bytes for people."""
    return f"{count / 1e9:.3g} GB" if count >= 1e9 else f"{count / 1e6:.3g} MB"


def money(value: float | None, currency: str) -> str:
    """An amount, or nothing."""
    return "" if value is None else f"{value:,.0f} {currency}" if value >= 100 else f"{value:.2f} {currency}"


def joules(value: float | None) -> str:
    """Energy in kWh or MWh, or nothing."""
    if value is None:
        return ""
    hours = value / 3.6e6
    return f"{hours / 1000:.3g} MWh" if hours >= 1000 else f"{hours:.3g} kWh"


def reasons(choice: Choice, answer: LayoutAnswer) -> str:
    """What binds a layout, in a few words."""
    step, limit = choice.step, usable(answer.cluster)
    said = []
    share = step.bubble / step.seconds
    if share > 0.02:
        said.append(f"bubble {share:.0%}")
    for name, seconds in (
        ("tensor links", step.busiest.tensor),
        ("context links", step.busiest.context),
        ("expert links", step.busiest.expert),
        ("data links", step.reduction + step.busiest.data),
        ("memory traffic", step.busiest.traffic),
        ("offloading", step.busiest.offload),
    ):
        if seconds / step.seconds > 0.05:
            said.append(f"{name} {seconds / step.seconds:.0%}")
    full = step.memory.total / limit
    said.append(f"memory {full:.0%} full" + (f" ({step.memory.largest})" if full > 0.7 else ""))
    return ", ".join(said)


def _line(choice: Choice, answer: LayoutAnswer) -> list[str]:
    step = choice.step
    peak = answer.cluster.peak(step.plan.compute)
    currency = answer.cluster.price.currency if answer.cluster.price else ""
    return [
        str(step.workers),
        str(step.plan),
        short_time(step.seconds),
        short_time(choice.seconds),
        money(choice.cost, currency),
        joules(choice.joules),
        gigabytes(step.memory.total),
        f"{step.flops_per_device / peak:.0%}",
        reasons(choice, answer),
    ]


HEAD = ("workers", "layout", "step", "run", "cost", "energy", "memory", "MFU", "what it is bound by")


def table(title: str, choices: list[Choice], answer: LayoutAnswer) -> Table:
    """Layouts, one a line; columns of which nothing is known are left out."""
    from rich import box
    from rich.table import Table

    lines = [_line(choice, answer) for choice in choices]
    kept = [i for i in range(len(HEAD)) if any(line[i] for line in lines)]
    made = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for i in kept:
        left = HEAD[i] in ("layout", "what it is bound by")
        made.add_column(HEAD[i], justify="left" if left else "right", no_wrap=not left)
    for number, line in enumerate(lines):
        made.add_row(*(line[i] for i in kept), style="bold green" if number == 0 else None)
    return made


def report_layout(answer: LayoutAnswer, console: Console, *, top: int = 5) -> None:
    """Print what was found.

    Args:
        answer: to print.
        console: to print on.
        top: how many of the best.
    """
    work, found = answer.work, answer.found
    console.print(
        f"{short_number(parameter_counts(work.model).total)} parameters, {short_number(answer.tokens)} tokens in steps "
        f"of {work.batch:,} rows of {work.tokens:,}; up to {answer.workers} x {answer.cluster.device.name}: "
        f"{found.tried:,} layouts, {found.too_large:,} too large",
        highlight=False,
    )
    if not found.best:
        _report_missing(answer, console)
        return
    console.print(table(f"Ranked by {answer.objective}", list(found.best[:top]), answer))
    beyond = [one for one in found.pareto if one.step.plan != found.best[0].step.plan][: 2 * top]
    if beyond:
        console.print(table("Slower, with fewer workers or less memory (Pareto set)", beyond, answer))
    best = found.best[0]
    console.print(f"[bold]Plan[/bold]: {best.step.plan}: {short_time(best.seconds)}", highlight=False)
    if answer.cluster.failures is not None:
        rate = answer.cluster.failure_rate(best.step.workers)
        assert rate is not None
        console.print(
            f"note: at the file's rate, about {rate * best.seconds:.2g} failures in that time", highlight=False
        )
    console.print("As overrides of a run's settings:")
    console.print("  " + " ".join(overrides_of(best.step)), highlight=False, soft_wrap=True)


def _report_missing(answer: LayoutAnswer, console: Console) -> None:
    gone = answer.missing
    assert gone is not None
    console.print(
        f"[bold]Nothing fits.[/bold] The least that any layout needs is {gigabytes(gone.needed.total)} a device "
        f"({gone.plan}), most of it {gone.needed.largest} ({gigabytes(getattr(gone.needed, gone.needed.largest))}); of "
        f"{gigabytes(answer.cluster.device.memory)} a plan counts on {gigabytes(gone.limit)}.",
        highlight=False,
    )
    if gone.workers is None:
        console.print("No number of such devices is found to do: take others with more memory, or a smaller model.")
    else:
        steps = "" if gone.batch == answer.work.batch else f", in steps of {gone.batch} rows"
        console.print(
            f"The smallest cluster of these devices that would do has {gone.workers}: {gone.does}{steps}.",
            highlight=False,
        )
