"""`resilin recipes list | show`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="Published methods, each with its claim, its runs and what was measured.", no_args_is_help=True)

Recipes = Annotated[
    Path | None, typer.Option("--recipes", help="The folder of recipes. Default: the nearest recipes/ from here up.")
]


@app.command("list")
def list_recipes(recipes: Recipes = None) -> None:
    """List the recipes, their papers, and whether their claims held when last run."""
    from rich.console import Console

    from resilin.recipes.find import recipes_folder
    from resilin.recipes.report import list_table

    Console().print(list_table(recipes_folder(recipes)))


@app.command()
def show(
    slug: Annotated[str, typer.Argument(help="The recipe's name.")],
    recipes: Recipes = None,
    preset: Annotated[str | None, typer.Option(help="Also list this preset's runs.")] = None,
) -> None:
    """Show one recipe: the claim, the paper's figures, the presets and their cost, and the last results.

    \b
    resilin recipes show small-scale-proxies
    resilin recipes show small-scale-proxies --preset cpu
    """
    from rich.console import Console

    from resilin.recipes.find import recipe_folder, recipes_folder
    from resilin.recipes.report import show_recipe

    show_recipe(recipe_folder(recipes_folder(recipes), slug), preset, Console())
