"""`resilin reproduce`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def reproduce(
    slug: Annotated[str, typer.Argument(help="The recipe's name; `resilin recipes list` shows them.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings laid over every run.")
    ] = None,
    preset: Annotated[str, typer.Option(help="cpu (minutes on two cores), gpu, or paper (its full size).")] = "cpu",
    seeds: Annotated[int | None, typer.Option(help="Only the first so many seeds of each grid.")] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Train every run again.")] = False,
    processes: Annotated[int | None, typer.Option(help="Worker processes, in place of the preset's.")] = None,
    recipes: Annotated[
        Path | None,
        typer.Option("--recipes", help="The folder of recipes. Default: the nearest recipes/ from here up."),
    ] = None,
    runs: Annotated[Path, typer.Option(help="Where the runs live.")] = Path("runs/recipes"),
) -> None:
    """Train a published method and its baseline on the same budget and seeds, and say whether its claims hold.

    Runs made before are read back; Ctrl-C saves, and the same command goes on from there. Results are written beside
    the recipe; with --seeds or overrides, which change what is tested, into the runs folder instead. A claim that
    does not hold is a result: it is printed, and the exit code is 0.

    \b
    resilin reproduce small-scale-proxies
    resilin reproduce small-scale-proxies --seeds 1 train.steps=100
    """
    from rich.console import Console

    from resilin.config.errors import UserError
    from resilin.recipes.find import recipe_folder, recipes_folder
    from resilin.recipes.report import print_results
    from resilin.recipes.reproduce import Request
    from resilin.recipes.reproduce import reproduce as run

    stray = [word for word in overrides or () if "=" not in word]
    if stray:
        raise UserError(f"{stray[0]!r}: an override has the form key.subkey=value, such as train.steps=100")
    if processes is not None and processes < 1:
        raise UserError(f"--processes {processes}: at least one is needed")
    request = Request(
        folder=recipe_folder(recipes_folder(recipes), slug),
        preset=preset,
        runs=runs,
        seeds=seeds,
        overrides=tuple(overrides or ()),
        fresh=fresh,
        processes=processes,
    )
    console = Console()
    results = run(request, console)
    if results is None:
        console.print("interrupted: finished runs are kept and unfinished ones are saved; the same command goes on")
        raise typer.Exit(130)
    print_results(results, request.output, console)
