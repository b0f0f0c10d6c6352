"""`resilin cluster`: the coordinator and the machines of an elastic run; look at its workers, add some, let some go."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from resilin.cli.arguments import RunArguments
from resilin.cli.option_groups import with_option_groups

if TYPE_CHECKING:
    from collections.abc import Mapping

    from resilin.cluster.place import Place

app = typer.Typer(
    help="The workers of an elastic run: look at them, add some, let some go, while it trains.", no_args_is_help=True
)

Where = Annotated[
    str, typer.Argument(metavar="FOLDER|HOST:PORT", help="The run's folder, or its coordinator.", show_default=False)
]
Numbers = Annotated[list[int], typer.Argument(help="Numbers of workers.", show_default=False)]
SecretFile = Annotated[
    Path | None,
    typer.Option(
        help="A file with the job's secret. Default: RESILIN_SECRET_FILE, RESILIN_SECRET, or the run's folder."
    ),
]


def _place(where: str, secret_file: Path | None) -> Place:
    """Where a job is found: in its folder, or as the user says."""
    from resilin.cluster.addresses import parse
    from resilin.cluster.handshake import read_secret
    from resilin.cluster.keeper import NobodyThereError
    from resilin.cluster.place import Place, found
    from resilin.config import UserError

    folder = Path(where)
    if folder.is_dir() or ":" not in where:
        try:
            return found(folder / "workers")
        except FileNotFoundError:
            raise NobodyThereError(
                f"{folder}: no elastic run is going on here; one is started with `resilin train ... --workers 4 "
                "cluster.elastic=true`"
            ) from None
    secret = read_secret(secret_file)
    if secret is None:
        raise UserError(
            f"{where}: its secret is needed: in a file (--secret-file, or the variable RESILIN_SECRET_FILE), or in the "
            "variable RESILIN_SECRET; or give the run's folder, where this machine has it"
        )
    return Place(*parse(where), secret)


def _ask(where: str, secret_file: Path | None, command: Mapping[str, Any]) -> dict[str, Any]:
    from resilin.cluster.place import ask
    from resilin.config import UserError

    place = _place(where, secret_file)
    try:
        answer = ask(place, command)
    except OSError as error:
        raise UserError(
            f"{where}: the coordinator of this run does not answer ({error}); has it been killed?"
        ) from None
    if not answer.get("ok"):
        raise UserError(f"{where}: {answer.get('why')}")
    return answer


@app.command()
@with_option_groups
def serve(
    given: RunArguments,
    host: Annotated[str, typer.Option(help="Address of this machine to listen at: cluster.host.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen at: cluster.port.")] = 29400,
    secret_file: SecretFile = None,
) -> None:
    """Coordinate a run on several machines, which join it; no worker is started here.

    It begins when --workers of them are ready. Without a secret given, one is made, and lies in the run's folder.

    \b
    resilin cluster serve run.toml --workers 4 --host 10.0.0.1
    resilin cluster join 10.0.0.1:29400 --workers 2 --secret-file secret     # on each machine
    """
    from resilin.cli.come_and_go import see_through
    from resilin.cluster.handshake import read_secret
    from resilin.cluster.hosts import Hosts
    from resilin.cluster.place import Place
    from resilin.config import UserError, load_settings
    from resilin.run.settings import RunSettings

    file, overrides = given.split()
    settings = load_settings(RunSettings, file, ["cluster.elastic=true", *overrides])
    if settings.parallel.workers < 1:
        raise UserError("say with how many workers the run begins: --workers (parallel.workers)")
    place = Place(host, port, read_secret(secret_file) or "")
    path = given.folder or settings.default_folder()
    raise typer.Exit(
        see_through(settings, path, given, lambda folder: Hosts(str(folder.resolve()), settings.cluster.silence), place)
    )


@app.command()
def join(
    where: Where,
    workers: Annotated[int, typer.Option(min=1, help="How many to start on this machine.")] = 1,
    address: Annotated[
        str, typer.Option(help="At which other machines reach this one. Default: that of the way to the coordinator.")
    ] = "",
    name: Annotated[
        str, typer.Option(help="Of this machine: copies of states go to others. Default: the system's.")
    ] = "",
    secret_file: SecretFile = None,
    wait: Annotated[float, typer.Option(min=0, help="Seconds for which the coordinator may not be there yet.")] = 60.0,
) -> None:
    """Start workers on this machine for a run, at its begin or later; they join at the end of a step.

    SIGTERM, SIGUSR1 or Ctrl-C: they leave without losing work, and this command ends. A second Ctrl-C kills them.
    """
    from resilin.cluster.keeper import Keeper, when_there
    from resilin.cluster.local import worker_command
    from resilin.cluster.starter import Door

    def look() -> Door:
        place = _place(where, secret_file)
        return Door(place.host, place.port, place.secret)

    keeper = when_there(
        look, lambda at: Keeper(at, workers, worker_command(), name=name, address=address), wait, settled=":" in where
    )
    typer.echo(f"{keeper.name} joins at {where}; output of its workers: {keeper.folder}")
    with keeper.noticing():
        code = keeper.run()
    raise typer.Exit(code)


@app.command()
def status(where: Where, secret_file: SecretFile = None) -> None:
    """Who there is, and what everyone has and does.

    A worker's number is its incarnation: it is given once, and whoever takes its place has another one.
    """
    from rich.console import Console
    from rich.table import Table

    told = _ask(where, secret_file, {"command": "status"})
    table = Table(title=f"{told['phase']}, step {told['step']}, epoch {told['epoch']}", title_justify="left", box=None)
    table.pad_edge, table.padding = False, (0, 2, 0, 0)
    names = ("worker", "host", "process", "state", "stage", "layers", "slots", "step", "does", "for", "copies at")
    for name in names:
        table.add_column(name, no_wrap=name != "does")
    for one in told["members"]:
        holders = ", ".join(map(str, one["holders"]))
        stage = "" if one["stage"] is None else one["stage"]
        parts = (_run(one["layers"], "all" if one["stage"] is not None else ""), _slots(one["slots"]))
        who = (one["number"], one["host"], one["process"] or "", one["state"])
        table.add_row(*map(str, (*who, stage, *parts, one["step"], one["doing"])), f"{one['seconds']:.1f} s", holders)
    Console(highlight=False).print(table)


def _slots(numbers: list[int] | None) -> str:
    from resilin.parallel.stretches import stretches

    if numbers is None:
        return ""
    return ", ".join(_run([run.start, run.stop], "") for run in stretches(numbers)) or "none"


def _run(bounds: list[int] | None, otherwise: str) -> str:
    """[first, end) as "first-last"."""
    if bounds is None:
        return otherwise
    first, end = bounds
    return "none" if first == end else str(first) if end == first + 1 else f"{first}-{end - 1}"


@app.command()
def add(
    where: Where,
    count: Annotated[int, typer.Argument(min=1, help="How many.")] = 1,
    host: Annotated[str | None, typer.Option(help="On which of the machines that have joined.")] = None,
    secret_file: SecretFile = None,
) -> None:
    """Start more workers; they join at the end of a step, once they are ready and have read their states."""
    numbers = _ask(where, secret_file, {"command": "add", "count": count, "host": host})["numbers"]
    typer.echo(f"started {', '.join(f'worker {number}' for number in numbers)}")


@app.command()
def drain(where: Where, numbers: Numbers, secret_file: SecretFile = None) -> None:
    """Let workers go: between two steps, once others have their states. Nothing is computed twice."""
    for number in numbers:
        _ask(where, secret_file, {"command": "drain", "number": number})
        typer.echo(f"worker {number} leaves")


@app.command()
def remove(where: Where, numbers: Numbers, secret_file: SecretFile = None) -> None:
    """Kill workers. What they had is taken from the copies that others keep."""
    for number in numbers:
        _ask(where, secret_file, {"command": "remove", "number": number})
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
    stages: Annotated[int, typer.Option(min=0, help="Stages of the pipeline; 0: as the settings say, else 4.")] = 0,
    replicas: Annotated[int, typer.Option(min=0, help="Of each stage; 0: as the settings say, else 4.")] = 0,
    micros: Annotated[
        int,
        typer.Option(min=0, help="Micro-batches of a step, of all replicas together; 0: likewise, else 4 for each."),
    ] = 0,
    micro: Annotated[int, typer.Option(min=0, help="Samples of each; 0: likewise, else as many as can be cut.")] = 0,
    tokens: Annotated[int, typer.Option(min=0, help="Of a sample; 0: likewise, else 1024.")] = 0,
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
    resilin cluster plan run.toml parallel.pipeline=2 parallel.data=3 --lose 0.2 --lose 1
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
