"""`resilin layout show | plan | schedule`."""

from __future__ import annotations

import re
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from resilin.cli.arguments import split_settings
from resilin.config.errors import UserError

app = typer.Typer(
    help="Who holds what on a mesh, what would move, and who does what when. Nothing is loaded.", no_args_is_help=True
)


class ShardingName(StrEnum):
    """What the axis dp cuts."""

    none = "none"
    fsdp = "fsdp"
    zero1 = "zero1"
    zero2 = "zero2"
    zero3 = "zero3"
    dealt = "dealt"


What = Annotated[
    list[str], typer.Argument(metavar="MODEL [KEY=VALUE]...", help="Settings file, run, Hugging Face folder or .gguf.")
]
Shown = Annotated[
    list[str],
    typer.Argument(
        metavar="WHAT [KEY=VALUE]...",
        help="Settings file, run, Hugging Face folder or .gguf; or a checkpoint, whose files hold its tensors.",
    ),
]
MeshText = Annotated[str, typer.Option("--mesh", help="Axes from the outermost: pp=2,dp=4,ep=1,tp=8.")]
Sharded = Annotated[ShardingName, typer.Option("--sharding", help="What the axis dp cuts.")]
Pattern = Annotated[str | None, typer.Option("--tensor", help="Draw the tensors whose names match this pattern.")]
Picture = Annotated[Path | None, typer.Option("--picture", help="Write a picture of them: .png, .svg or .pdf.")]
Multiple = Annotated[int, typer.Option("--vocabulary-multiple", min=1, help="Pad vocabulary rows to a multiple.")]


def _model(arguments: list[str]) -> Any:
    from resilin.run.model_layout import outline_at

    path, overrides = split_settings(arguments)
    if path is None:
        raise UserError("a layout needs a model: a settings file, a run, a Hugging Face folder, or a .gguf file")
    return outline_at(path, overrides)


def _matching(names: list[str], pattern: str | None) -> list[str]:
    if pattern is None:
        return []
    try:
        found = [name for name in names if re.search(pattern, name)]
    except re.error as error:
        raise UserError(f"--tensor {pattern!r} is not a regular expression: {error}") from None
    if not found:
        raise UserError(f"--tensor {pattern!r} matches none of {len(names)} tensors, such as {', '.join(names[:4])}")
    return found


def _laid_out(arguments: list[str], mesh: str, sharding: str, vocabulary_multiple: int) -> Any:
    from resilin.layout import Mesh
    from resilin.run.model_layout import checkpoint_layout, lay_out

    found = checkpoint_layout(Path(arguments[0])) if arguments else None
    return found or lay_out(_model(arguments), Mesh.parse(mesh), sharding, vocabulary_multiple)  # type: ignore[arg-type]


@app.command()
def show(
    what: Shown,
    mesh: MeshText = "dp=4",
    sharding: Sharded = ShardingName.fsdp,
    tensor: Pattern = None,
    picture: Picture = None,
    vocabulary_multiple: Multiple = 1,
) -> None:
    """Draw who holds what: the ranks of a mesh, or the files of a checkpoint.

    \b
    resilin layout show run.toml --mesh pp=2,dp=2,tp=2 --sharding zero1
    resilin layout show SmolLM2-135M --mesh dp=3,tp=3 --tensor 'blocks.0.attention'
    resilin layout show run.toml --mesh tp=4 --tensor embed --picture embed.svg
    resilin layout show runs/shakespeare/checkpoints/step-00000300
    """
    from resilin.layout import check
    from resilin.layout.show import drawing, places_table, tensors_table

    layout = _laid_out(what, mesh, sharding.value, vocabulary_multiple)
    check(layout)
    names = _matching(list(layout.tensors), tensor)
    typer.echo(tensors_table(layout.select(names) if names else layout))
    typer.echo("\n" + places_table(layout))
    for name in names[:8]:
        typer.echo("\n" + drawing(layout, name))
    if picture is not None:
        from resilin.layout.picture import draw

        draw([("", layout)], names[:8] or list(layout.tensors)[:4], picture)
        typer.echo(f"\nwrote {picture}")


@app.command()
def plan(
    what: What,
    mesh: MeshText = "dp=4",
    sharding: Sharded = ShardingName.fsdp,
    to_mesh: Annotated[str, typer.Option("--to-mesh", help="The mesh that is wanted.")] = "dp=3",
    to_sharding: Annotated[ShardingName | None, typer.Option(help="What dp cuts there; left out: as before.")] = None,
    tensor: Pattern = None,
    picture: Picture = None,
    vocabulary_multiple: Multiple = 1,
) -> None:
    """Count what would move from one mesh to another; ranks of one number are the same memory.

    \b
    resilin layout plan run.toml --mesh dp=4 --to-mesh dp=3
    resilin layout plan run.toml --mesh dp=4 --to-mesh dp=3 --sharding dealt
    resilin layout plan run.toml --mesh pp=2,dp=2,tp=2 --sharding zero1 --to-mesh tp=4
    """
    from resilin.layout import Mesh
    from resilin.layout import plan as make_plan
    from resilin.layout.show import plan_table
    from resilin.run.model_layout import lay_out, owners_after

    model, here, there = _model(what), Mesh.parse(mesh), Mesh.parse(to_mesh)
    source = lay_out(model, here, sharding.value, vocabulary_multiple)
    owners = owners_after(here, there)
    target = lay_out(model, there, (to_sharding or sharding).value, vocabulary_multiple, owners)
    names = _matching(list(target.tensors), tensor)
    typer.echo(plan_table(make_plan(source, target, names or None)))
    if picture is not None:
        from resilin.layout.picture import draw

        draw([(mesh, source), (to_mesh, target)], names[:8] or list(target.tensors)[:4], picture)
        typer.echo(f"\nwrote {picture}")


ScheduleName = Annotated[
    str | None,
    typer.Argument(
        metavar="[NAME|FILE.csv]",
        help="A schedule, or a file with a line of actions for each rank. None: all compared.",
    ),
]
Ranks = Annotated[int, typer.Option("--ranks", min=1, help="Pipeline ranks.")]
Micros = Annotated[int, typer.Option("--micros", min=1, help="Micro-batches.")]
Chunks = Annotated[int | None, typer.Option("--chunks", min=1, help="Stages a rank. By default as the schedule has.")]
Group = Annotated[int | None, typer.Option("--group", min=1, help="Micro-batches of an interleaved schedule's group.")]
Took = Annotated[str, typer.Option(help="Time of a rank's whole share for one micro-batch, such as 1, 0.5 or 1/3.")]
Measured = Annotated[
    Path | None, typer.Option("--measured", help="Show these times of a real run instead: rank,action,start,end.")
]
Drawn = Annotated[Path | None, typer.Option("--picture", help="Write a picture: .png, .svg or .pdf.")]
Csv = Annotated[Path | None, typer.Option("--csv", help="Write the actions, a line for each rank.")]
Times = Annotated[Path | None, typer.Option("--times", help="Write the times: rank,action,start,end.")]


@app.command()
def schedule(
    name: ScheduleName = None,
    ranks: Ranks = 4,
    micros: Micros = 8,
    chunks: Chunks = None,
    group: Group = None,
    forward: Took = "1",
    input_gradient: Took = "1",
    weight_gradient: Took = "1",
    transfer: Annotated[str, typer.Option(help="Time of a message between two ranks.")] = "0",
    measured: Measured = None,
    picture: Drawn = None,
    csv: Csv = None,
    times: Times = None,
) -> None:
    """Draw what each pipeline rank does when, and what the order costs in time and activations.

    \b
    resilin layout schedule --ranks 8 --micros 32 --picture all.svg
    resilin layout schedule 1f1b --ranks 4 --micros 8 --picture 1f1b.svg
    resilin layout schedule interleaved --chunks 2 --transfer 0.1 --csv orders.csv
    resilin layout schedule orders.csv --weight-gradient 0.8
    resilin layout schedule --measured times.csv --picture run.svg
    """
    from resilin.parallel.pipeline.show import Wanted, all_methods, measured_times, one_schedule

    wanted = Wanted.parse(ranks, micros, chunks, group, forward, input_gradient, weight_gradient, transfer)
    if measured is not None and name is not None:
        raise UserError(f"show either the schedule {name} or the times of {measured}, not both")
    if measured is not None:
        shown = measured_times(measured)
    elif name is not None:
        shown = one_schedule(name, wanted)
    else:
        shown = all_methods(wanted)
    typer.echo(shown.text)
    shown.write(picture, csv, times)
