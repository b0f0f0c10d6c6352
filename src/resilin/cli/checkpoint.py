"""`resilin checkpoint inspect | verify | diff | convert | consolidate | prune`."""

from __future__ import annotations

from typing import Annotated

import typer

from resilin.cli.checkpoint_convert import convert

app = typer.Typer(help="Look at checkpoints, check, compare, convert and thin them out.", no_args_is_help=True)

Where = Annotated[str, typer.Argument(metavar="WHERE", help="A run, a folder or URL of checkpoints, or one of them.")]
Step = Annotated[int | None, typer.Option(help="Which step; the newest that is whole when left out.")]

EXIT_FOUND = 1
"""There is a difference, or damage."""


@app.command()
def inspect(
    where: Where, step: Step = None, tensors: Annotated[bool, typer.Option(help="Also list every tensor.")] = False
) -> None:
    """Tell what a checkpoint holds: parts, files, tensors and values; no tensor is read.

    \b
    resilin checkpoint inspect runs/shakespeare
    resilin checkpoint inspect s3://bucket/run --step 200 --tensors
    """
    from resilin.cli.inspect import print_facts
    from resilin.run.look import at_checkpoint

    print_facts(at_checkpoint(where, step=step, tensors=tensors))


@app.command()
def verify(
    where: Where,
    step: Step = None,
    everything: Annotated[bool, typer.Option("--all", help="Every checkpoint there, not the newest alone.")] = False,
) -> None:
    """Read every byte and name everything that is wrong, each with its file and tensor; exit code 1 if there is any.

    Of several checkpoints the newest is read, also where a run would pass over it.

    \b
    resilin checkpoint verify runs/shakespeare
    resilin checkpoint verify runs/shakespeare --all
    """
    from resilin.checkpoint.inspect import find_checkpoint, list_checkpoints
    from resilin.checkpoint.verify import damages

    places = (
        [line.path for line in list_checkpoints(where)] if everything else [find_checkpoint(where, step, whole=False)]
    )
    found = 0
    for place in places:
        problems = list(damages(place))
        found += len(problems)
        typer.echo(f"{place}: {'every checksum agrees' if not problems else f'{len(problems)} damaged'}")
        for problem in problems:
            typer.secho(f"  {problem}", fg=typer.colors.RED)
    if found:
        raise typer.Exit(EXIT_FOUND)


@app.command()
def diff(
    first: Annotated[str, typer.Argument(metavar="A", help="A checkpoint, a run, or a folder or URL of checkpoints.")],
    second: Annotated[str, typer.Argument(metavar="B", help="Another.")],
    tolerance: Annotated[float, typer.Option(help="|a - b| that counts as equal; 0: bits must be equal.")] = 0.0,
    part: Annotated[list[str] | None, typer.Option(help="Only this top-level key (model, optimizer, ...).")] = None,
) -> None:
    """Tell which tensors and values differ, by how much, and where; exit code 1 if any does.

    The two may have been saved by different numbers of processes in different layouts.

    \b
    resilin checkpoint diff runs/a runs/b --part model
    resilin checkpoint diff runs/a/checkpoints/step-00000100 runs/a/checkpoints/step-00000200
    """
    from resilin.checkpoint.diff import differences
    from resilin.checkpoint.inspect import find_checkpoint

    count = 0
    for difference in differences(find_checkpoint(first), find_checkpoint(second), tolerance=tolerance, parts=part):
        typer.echo(str(difference))
        count += 1
    if count:
        raise typer.Exit(EXIT_FOUND)
    typer.echo("no difference")


app.command()(convert)


@app.command()
def consolidate(
    source: Where,
    target: Annotated[str, typer.Argument(metavar="TARGET", help="A folder or URL of checkpoints to write into.")],
    step: Step = None,
) -> None:
    """Write what many processes saved as one would have: model.safetensors and so on, a tensor in memory at a time.

    \b
    resilin checkpoint consolidate runs/large whole
    """
    from resilin.checkpoint.consolidate import consolidate as write
    from resilin.checkpoint.inspect import find_checkpoint

    typer.echo(f"wrote {write(find_checkpoint(source, step), target).path}")


@app.command()
def prune(
    where: Annotated[str, typer.Argument(metavar="WHERE", help="A run, or a folder or URL of checkpoints.")],
    keep_last: Annotated[int, typer.Option(min=1, help="How many of the newest stay.")],
    keep_every: Annotated[int, typer.Option(min=0, help="Steps divisible by this stay besides; 0: none.")] = 0,
    dry_run: Annotated[bool, typer.Option(help="Only tell what would go.")] = False,
) -> None:
    """Remove old checkpoints; those that are damaged are not counted and stay.

    \b
    resilin checkpoint prune runs/shakespeare --keep-last 2 --keep-every 1000 --dry-run
    """
    from resilin.checkpoint.inspect import folder_of

    folder = folder_of(where)
    folder.keep_last, folder.keep_every = keep_last, keep_every
    steps = folder.superfluous() if dry_run else folder.prune()
    folder.close()
    typer.echo(f"{'would remove' if dry_run else 'removed'}: {', '.join(map(str, steps)) or 'none'}")
