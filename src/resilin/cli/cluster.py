"""`resilin cluster`: look at the workers of a running elastic run, add some, let some go."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from collections.abc import Mapping

app = typer.Typer(
    help="The workers of an elastic run: look at them, add some, let some go, while it trains.", no_args_is_help=True
)

Folder = Annotated[Path, typer.Argument(help="The run's folder.", show_default=False)]
Numbers = Annotated[list[int], typer.Argument(help="Numbers of workers.", show_default=False)]


def _ask(folder: Path, command: Mapping[str, Any]) -> dict[str, Any]:
    from resilin.cluster.elastic_job import ask
    from resilin.config import UserError

    try:
        answer = ask(folder / "workers", command)
    except FileNotFoundError:
        raise UserError(
            f"{folder}: no elastic run is going on here; one is started with `resilin train ... --workers 4 "
            "cluster.elastic=true`"
        ) from None
    except OSError as error:
        raise UserError(f"{folder}: the launcher of this run does not answer ({error}); has it been killed?") from None
    if not answer.get("ok"):
        raise UserError(f"{folder}: {answer.get('why')}")
    return answer


@app.command()
def status(folder: Folder) -> None:
    """Who there is, and what everyone does."""
    from rich.console import Console
    from rich.table import Table

    told = _ask(folder, {"command": "status"})
    table = Table(title=f"{told['phase']}, step {told['step']}, epoch {told['epoch']}", title_justify="left", box=None)
    table.pad_edge, table.padding = False, (0, 2, 0, 0)
    for name in ("worker", "host", "process", "state", "step", "does", "for", "copies at"):
        table.add_column(name, no_wrap=name != "does")
    for one in told["members"]:
        holders = ", ".join(map(str, one["holders"]))
        cells = (one["number"], one["host"], one["process"] or "", one["state"], one["step"], one["doing"])
        table.add_row(*map(str, cells), f"{one['seconds']:.1f} s", holders)
    Console(highlight=False).print(table)


@app.command()
def add(folder: Folder, count: Annotated[int, typer.Argument(min=1, help="How many.")] = 1) -> None:
    """Start more workers on this machine; they join between two steps, once they are ready."""
    numbers = _ask(folder, {"command": "add", "count": count})["numbers"]
    typer.echo(f"started {', '.join(f'worker {number}' for number in numbers)}")


@app.command()
def drain(folder: Folder, numbers: Numbers) -> None:
    """Let workers go: between two steps, once others have their states. Nothing is computed twice."""
    for number in numbers:
        _ask(folder, {"command": "drain", "number": number})
        typer.echo(f"worker {number} leaves")


@app.command()
def remove(folder: Folder, numbers: Numbers) -> None:
    """Kill workers. What they had is taken from the copies that others keep."""
    for number in numbers:
        _ask(folder, {"command": "remove", "number": number})
        typer.echo(f"killed worker {number}")
