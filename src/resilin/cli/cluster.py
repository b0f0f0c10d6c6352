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


@app.command()
def plan(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[SETTINGS.toml|FOLDER] [KEY=VALUE]...",
            help="A run's settings, or what it left: its decoder's blocks and head give the costs.",
        ),
    ] = None,
    lose: Annotated[
        list[str] | None, typer.Option(help="STAGE or STAGE.REPLICA, counted from 0; may be repeated. Default: 1.0.")
    ] = None,
    stages: Annotated[int, typer.Option(min=1, help="Stages of the pipeline.")] = 4,
    replicas: Annotated[int, typer.Option(min=1, help="Of each stage.")] = 4,
    micros: Annotated[int, typer.Option(min=1, help="Micro-batches of a step, of all replicas together.")] = 16,
    micro: Annotated[int, typer.Option(min=0, help="Samples of each. Default: as many as can be shared out.")] = 0,
    tokens: Annotated[int, typer.Option(min=1, help="Of a sample, for the cost of attention.")] = 1024,
    layers: Annotated[str, typer.Option(help="How many alike, or the cost of each: 32, or 1,1,2,1.")] = "",
    head: Annotated[str, typer.Option(help="Cost of what follows the last layer, in the same unit.")] = "",
    tflops: Annotated[float, typer.Option(min=0, help="10^12 operations a second of a member; 0: not known.")] = 0.0,
    counts: Annotated[str, typer.Option(help="Layers of each stage now: 8,8,8,8. Default: the best split.")] = "",
    measured: Annotated[
        Path | None, typer.Option(help="A run's own times, of parallel.trace: workers/schedule.csv.")
    ] = None,
    memory: Annotated[float, typer.Option(min=0, help="GiB of a member; 0: enough.")] = 0.0,
    bandwidth: Annotated[float, typer.Option(min=0, help="GB a second to move layers; 0: at once.")] = 0.0,
    clocks: Annotated[str, typer.Option(help="Clocks that can be set, the usual one first: 1.41,1.2,1.5,1.6.")] = "",
    fixed: Annotated[str, typer.Option(help="Share of a stage's time that no clock shortens.")] = "0",
    clocks_hook: Annotated[
        str, typer.Option(help="module:function that is handed the clocks of every stage. Default: nobody is.")
    ] = "",
    horizon: Annotated[int, typer.Option(min=0, help="Steps within which moving layers has to pay.")] = 50,
    as_json: Annotated[bool, typer.Option("--json", help="Every decision with its reasons, as JSON.")] = False,
) -> None:
    """Forecast a loss: what each way to go on would cost, and what would be decided, with the reasons.

    Replays the pipeline's own schedule for the members that are left: the
    whole replica out, orphans re-routed, micro-batches reshaped, layers moved,
    clocks raised. Nothing is started.

    \b
    resilin cluster plan --stages 4 --replicas 4 --micros 16 --lose 1
    resilin cluster plan run.toml --stages 2 --replicas 3 --lose 0.2 --lose 1
    resilin cluster plan run.toml --counts 3,3 --stages 2 --measured runs/run/workers/schedule.csv
    resilin cluster plan --layers 8 --clocks 1.41,1.5,1.6 --fixed 0.2
    """
    import json

    from resilin.cli.arguments import split_settings
    from resilin.planner.change import ChangeRequest, forecast, numbers_of, text

    file, overrides = split_settings(arguments or [])
    told = forecast(
        ChangeRequest(
            file=file,
            overrides=tuple(overrides),
            stages=stages,
            replicas=replicas,
            micros=micros,
            micro=micro,
            tokens=tokens,
            layers=layers,
            head=head,
            tflops=tflops,
            lost=tuple(lose or ()),
            measured=measured,
            counts=tuple(int(count) for count in numbers_of("--counts", counts)),
            memory=memory,
            bandwidth=bandwidth,
            clocks=numbers_of("--clocks", clocks),
            hook=clocks_hook,
            fixed=numbers_of("--fixed", fixed)[0],
            horizon=horizon,
        )
    )
    typer.echo(json.dumps(told.json(), indent=1) if as_json else text(told))
