"""Where recipes lie."""

from __future__ import annotations

import sys
from pathlib import Path

from resilin.config import SettingsError
from resilin.config.settings import closest


def _holds_recipes(folder: Path) -> bool:
    return folder.is_dir() and any(folder.glob("*/recipe.toml"))


def recipes_folder(given: Path | None = None, start: Path | None = None) -> Path:
    """The folder of recipes.

    Args:
        given: the user's choice; taken as it is.
        start: where to begin looking for `recipes/`, upward; the current folder when None.

    Returns:
        `given`, else the nearest `recipes/` at or above `start`, else that of the checkout the package lies in, else
        the one installed beside it.

    Raises:
        SettingsError: saying where it looked.
    """
    if given is not None:
        if not _holds_recipes(given):
            raise SettingsError(f"{given}: holds no recipe (a folder with a recipe.toml inside)")
        return given
    here = (start or Path.cwd()).resolve()
    candidates = [folder / "recipes" for folder in (here, *here.parents)]
    candidates += [Path(__file__).resolve().parents[3] / "recipes", Path(sys.prefix) / "share/resilin/recipes"]
    for folder in candidates:
        if _holds_recipes(folder):
            return folder
    raise SettingsError(
        f"no recipes found: looked for recipes/<name>/recipe.toml in {here} and the folders above it, and beside the "
        "package; name their folder with --recipes PATH"
    )


def slugs(folder: Path) -> list[str]:
    """The names of the recipes in a folder."""
    return sorted(path.parent.name for path in folder.glob("*/recipe.toml"))


def recipe_folder(folder: Path, slug: str) -> Path:
    """The folder of one recipe.

    Raises:
        SettingsError: with the nearest name, or all of them.
    """
    known = slugs(folder)
    if slug in known:
        return folder / slug
    near = closest(slug, known)
    hint = f"did you mean {near!r}?" if near else f"the recipes here are: {', '.join(known)}"
    raise SettingsError(f"{slug}: no such recipe in {folder}; {hint}")
