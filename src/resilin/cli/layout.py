"""`resilin layout show | plan`."""

from __future__ import annotations

import re
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from resilin.cli.arguments import split_settings
from resilin.config.errors import UserError

app = typer.Typer(help="Who holds what on a mesh, and what would move. Nothing is loaded.", no_args_is_help=True)


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
