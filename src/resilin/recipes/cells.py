"""From a preset to the runs it needs: every cell of every grid with its resolved settings and their hash."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from resilin.config import SettingsError, parse_settings
from resilin.config.load import apply_override, merge
from resilin.recipes.recipe import Axis, Patch, Recipe, Value
from resilin.run.settings import RunSettings

NOT_HASHED = ("name", "checkpoint", "log")
"""Sections of a run's settings that change no number."""


@dataclass(frozen=True, slots=True)
class Cell:
    """One combination of a grid.

    Attributes:
        grid, arm, axes, seed: its place; `axes` maps an axis name to its value or the name of its patch.
        settings: what the run is made of.
        asked: the tree of settings that the recipe writes, without the defaults it leaves out.
    """

    grid: str
    arm: str
    axes: dict[str, Value]
    seed: int
    settings: RunSettings
    asked: Patch

    def __str__(self) -> str:
        places = [
            f"{name}={value:g}" if isinstance(value, float) else f"{name}={value}" for name, value in self.axes.items()
        ]
        return " ".join([self.grid, self.arm, *places, f"seed={self.seed}"])


def nested(key: str, value: Any) -> Patch:
    """`{"a": {"b": value}}` for the key "a.b"."""
    for part in reversed(key.split(".")):
        value = {part: value}
    return value  # type: ignore[no-any-return]


def _points(axis: Axis) -> list[tuple[Value, Patch]]:
    if axis.points:
        return list(axis.points.items())
    return [(value, nested(axis.key, value)) for value in axis.values]


def cells(
    recipe: Recipe, preset: str, *, seeds: Sequence[int] | None = None, overrides: Sequence[str] = ()
) -> Iterator[Cell]:
    """Every cell of a preset, grids in the order written, seeds innermost.

    Args:
        recipe: the recipe.
        preset: one of its presets.
        seeds: in place of all seeds the recipe names.
        overrides: `dotted.key=value` laid over every run's settings last.

    Raises:
        SettingsError: naming the cell whose settings cannot be used, and why.
    """
    chosen = recipe.preset(preset)
    base = merge(recipe.settings, chosen.settings)
    for grid_name, grid in recipe.grids(preset).items():
        start = merge(base, grid.settings)
        for arm in grid.arms or recipe.arms:
            of_arm = merge(merge(start, recipe.arms[arm]), chosen.arms.get(arm, {}))
            for combination in itertools.product(*(_points(axis) for axis in grid.axes.values())):
                tree = of_arm
                for _, patch in combination:
                    tree = merge(tree, patch)
                axes = dict(zip(grid.axes, (value for value, _ in combination), strict=True))
                for seed in seeds if seeds is not None else grid.seeds or chosen.seeds:
                    full = json.loads(json.dumps({**tree, "seed": seed}))
                    for override in overrides:
                        apply_override(full, override)
                    place = f"preset {preset}, grid {grid_name}, arm {arm}, {axes or 'no axes'}"
                    yield Cell(grid_name, arm, axes, seed, parse_settings(RunSettings, full, place), full)


def run_hash(asked: Mapping[str, Any], data_digest: str, versions: Mapping[str, str]) -> str:
    """Names a run by what it was asked to be: 16 hexadecimal digits.

    Defaults are left out, so that a new setting does not rename every run; `resilin.recipes.execute.read_record`
    compares the resolved settings before it believes a record.
    """
    tree = {key: value for key, value in asked.items() if key not in NOT_HASHED}
    text = json.dumps([tree, data_digest, dict(versions)], sort_keys=True, separators=(",", ":"))
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def hashed(found: Sequence[Cell], digest_of: Callable[[RunSettings], str], versions: Mapping[str, str]) -> list[str]:
    """The hash of each cell; the data of equal source settings is read once."""
    digests: dict[str, str] = {}
    hashes = []
    for cell in found:
        source = json.dumps(cell.settings.source.model_dump(mode="json"), sort_keys=True)
        if source not in digests:
            digests[source] = digest_of(cell.settings)
        hashes.append(run_hash(cell.asked, digests[source], versions))
    return hashes


def check(recipe: Recipe, overrides: Sequence[str] = ()) -> None:
    """Resolve every cell of every preset, so that an error shows before the first run.

    Raises:
        SettingsError: for the first cell that cannot be used, or a preset without any.
    """
    for preset in recipe.presets:
        if not any(True for _ in cells(recipe, preset, seeds=(0,), overrides=overrides)):
            raise SettingsError(f"preset {preset}: has no runs; give its grids arms and axis values")
