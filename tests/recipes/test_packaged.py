"""Every recipe of the checkout is part of the installed package."""

from __future__ import annotations

import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_wheel_holds_every_recipe_with_all_its_files() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["data-files"]
    for recipe in sorted(ROOT.glob("recipes/*/recipe.toml")):
        folder = recipe.parent
        patterns = listed[f"share/resilin/recipes/{folder.name}"]
        held = {file for pattern in patterns for file in ROOT.glob(pattern)}
        assert held == {file for file in folder.rglob("*") if file.is_file()}, folder.name
