"""Who would do what, as tables in the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from resilin.run.who_does_what import Division

_SHOWN = 64  # workers in a table


def print_division(division: Division) -> None:
    """Write the workers, their groups, and what the pipeline costs."""
    from rich.console import Console
    from rich.table import Table

    from resilin.parallel.stretches import stretches

    axes = {"pp": "stage", "rep": "replica", "dp": "data", "cp": "context", "tp": "tensor", "ep": "expert"}
    there = [axis for axis in axes if axis in division.shares[0].coordinates]
    held = division.bubble is not None
    table = Table(title=f"{division.world}: who does what (memory in MiB)", title_justify="left", box=None)
    table.pad_edge, table.padding = False, (0, 1, 0, 0)  # one blank between columns: 80 characters have to do
    names = ["worker", *(axes[axis] for axis in there), "blocks", "slots", "micro", *(["held"] if held else [])]
    for name in (*names, "weight", "grads", "states", "acts", "all"):
        table.add_column(name, justify="right", no_wrap=True)
    for share in division.shares[:_SHOWN]:
        table.add_row(
            str(share.rank),
            *(str(share.coordinates[axis]) for axis in there),
            ", ".join(_run(blocks) for blocks in share.blocks) or "-",
            ", ".join(map(_run, stretches(share.slots))) or "none",
            str(share.micro_batches),
            *([str(share.in_flight)] if held else []),
            *(_mib(b) for b in (share.weights, share.gradients, share.optimizer, share.activations, share.total)),
        )
    console = Console(highlight=False)
    console.print(table)
    if len(division.shares) > _SHOWN:
        console.print(f"and {len(division.shares) - _SHOWN} more")
    told = "micro: micro-batches in a step" + ("; held: those whose activations are there at once" if held else "")
    console.print(f"{told}; acts: an estimate\n")
    groups = Table(show_header=False, box=None, pad_edge=False)
    groups.add_column(style="bold cyan", no_wrap=True)
    groups.add_column(overflow="fold")
    for purpose, members in division.groups.items():
        shown = "  ".join(" ".join(map(str, ranks[:8])) + (" ..." if len(ranks) > 8 else "") for ranks in members[:8])
        groups.add_row(purpose, shown + (f"  and {len(members) - 8} more" if len(members) > 8 else ""))
    if division.bubble is not None:
        groups.add_row(
            "pipeline bubble", f"{division.bubble:.1%} of the time that is computed, stages alike, messages free"
        )
    console.print(groups)


def _run(numbers: range) -> str:
    return f"{numbers[0]}-{numbers[-1]}" if len(numbers) > 1 else str(numbers[0])


def _mib(value: float) -> str:
    mib = value / 2**20
    return f"{mib:,.0f}" if mib >= 100 else f"{mib:.1f}"
