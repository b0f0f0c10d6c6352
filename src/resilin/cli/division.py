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

    axes = {"pp": "stage", "rep": "replica", "dp": "data", "cp": "context", "tp": "tensor", "ep": "expert"}
    there = [axis for axis in axes if axis in division.shares[0].coordinates]
    table = Table(title=f"{division.world}: who does what", title_justify="left", box=None, pad_edge=False)
    for name in ("worker", *(axes[axis] for axis in there), "blocks", "slots", "micro-batches", "weights", "gradients"):
        table.add_column(name, justify="right")
    for name in ("optimizer", "activations", "together"):
        table.add_column(name, justify="right")
    for share in division.shares[:_SHOWN]:
        flight = f" ({share.in_flight} in flight)" if division.bubble is not None else ""
        table.add_row(
            str(share.rank),
            *(str(share.coordinates[axis]) for axis in there),
            ", ".join(_run(blocks) for blocks in share.blocks) or "-",
            _run(share.slots),
            f"{share.micro_batches}{flight}",
            *(_bytes(b) for b in (share.weights, share.gradients, share.optimizer, share.activations, share.total)),
        )
    console = Console(highlight=False)
    console.print(table)
    if len(division.shares) > _SHOWN:
        console.print(f"and {len(division.shares) - _SHOWN} more")
    console.print()
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
    if not len(numbers):
        return "none"
    return f"{numbers[0]}-{numbers[-1]}" if len(numbers) > 1 else str(numbers[0])


def _bytes(value: float) -> str:
    return f"{value / 2**30:.2f} GiB" if value >= 2**30 else f"{value / 2**20:.1f} MiB"
