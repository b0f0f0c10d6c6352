"""What a `recipe.toml` says: a claim, its paper, the arms to compare and the presets to compare them at."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from resilin.config import Settings, parse_settings
from resilin.config.load import read_toml
from resilin.config.settings import closest

Patch = dict[str, Any]
"""A tree laid over a run's settings, table by table."""

Value = bool | int | float | str
"""A point of an axis: a value of its key, or the name of one of its patches."""


class PaperFigure(Settings):
    """A number of the paper, as it states it."""

    finding: str
    figure: str


class Paper(Settings):
    """Where the claim comes from."""

    title: str
    year: int
    arxiv: str = Field(pattern=r"^\d{4}\.\d{4,5}$")
    """arXiv identifier, such as "2309.14322"."""
    figures: tuple[PaperFigure, ...] = ()
    unpublished: str = ""
    """What of its models and settings is not published; then there may be no preset `paper`."""


class Axis(Settings):
    """One dimension of a grid: values of a single setting, or named patches."""

    key: str = ""
    """Dotted setting that `values` go to."""
    values: tuple[Value, ...] = ()
    points: dict[str, Patch] = Field(default={})
    """Patches by name, for settings that change together (a model size)."""

    @model_validator(mode="after")
    def _one_form(self) -> Axis:
        if bool(self.key and self.values) == bool(self.points) or bool(self.key) != bool(self.values):
            raise PydanticCustomError(
                "axis_form",
                "an axis has either key and values (key = 'optimizer.lr', values = [1e-3, 1e-2]) or points",
            )
        if len(set(self.values)) != len(self.values):
            raise PydanticCustomError("axis_values", "a value is listed twice")
        return self


class Grid(Settings):
    """Arms x axes x seeds."""

    arms: tuple[str, ...] = ()
    """Empty: every arm of the recipe."""
    seeds: tuple[int, ...] = ()
    """Empty: the preset's."""
    settings: Patch = Field(default={})
    axes: dict[str, Axis] = Field(default={})


class Preset(Settings):
    """The claim at one scale."""

    needs: Literal["cpu", "cuda"] = "cpu"
    seeds: tuple[int, ...] = Field(default=(0, 1, 2), min_length=1)
    processes: int = Field(default=1, ge=1)
    """Worker processes; more than 1 pays for models too small to keep several cores busy."""
    threads: int = Field(default=0, ge=0)
    """torch threads of each process; 0 leaves torch's choice."""
    settings: Patch = Field(default={})
    arms: dict[str, Patch] = Field(default={})
    """Laid over the recipe's arms of these names, where a scale needs other values."""
    grids: dict[str, Grid] = Field(default={})


class Comparison(Settings):
    """What the default analysis compares."""

    metric: str = "loss"
    """A metric of the last evaluation."""
    better: Literal["lower", "higher"] = "lower"
    baseline: str = ""
    """Arm that the others should beat; empty: the first arm."""


class Recipe(Settings):
    """A whole recipe file; `load_recipe` reads it."""

    title: str
    claim: str
    paper: Paper
    analysis: str = Field(default="resilin.recipes.compare:compare", pattern=r"^[\w.]+:\w+$")
    """Import path of a function `Study -> Findings`."""
    runner: str = Field(default="", pattern=r"^([\w.]+:\w+)?$")
    """Import path of what trains a run (`resilin.recipes.execute.Runner`); empty: a run in one process."""
    series: tuple[str, ...] = ("loss",)
    """Logged quantities each record keeps, as shell patterns."""
    settings: Patch
    arms: dict[str, Patch] = Field(min_length=1)
    compare: Comparison = Comparison()
    presets: dict[Literal["cpu", "gpu", "paper"], Preset] = Field(min_length=1)

    @model_validator(mode="after")
    def _arms_exist(self) -> Recipe:
        named = [(f"presets.{p}.grids.{g}.arms", a) for p, preset in self.presets.items()
                 for g, grid in preset.grids.items() for a in grid.arms]  # fmt: skip
        named += [(f"presets.{p}.arms", a) for p, preset in self.presets.items() for a in preset.arms]
        named += [("compare.baseline", self.compare.baseline)] if self.compare.baseline else []
        for where, arm in named:
            if arm not in self.arms:
                near = closest(arm, self.arms)
                hint = f"did you mean {near!r}?" if near else f"the arms are {', '.join(self.arms)}"
                raise PydanticCustomError(
                    "unknown_arm", "{where} names an arm {arm} that is not there; {hint}",
                    {"where": where, "arm": repr(arm), "hint": hint},
                )  # fmt: skip
        return self

    def grids(self, preset: str) -> dict[str, Grid]:
        """The grids of a preset; where it names none, one grid `main` of every arm."""
        return self.preset(preset).grids or {"main": Grid()}

    def preset(self, name: str) -> Preset:
        """A preset by name.

        Raises:
            KeyError: naming those there are.
        """
        for key, preset in self.presets.items():
            if key == name:
                return preset
        raise KeyError(f"preset {name!r} is not in this recipe; it has {', '.join(self.presets)}")


def load_recipe(folder: Path) -> Recipe:
    """The recipe of a folder.

    Raises:
        SettingsError: naming every key that is wrong, its value, what was expected, and the nearest known key.
    """
    path = folder / "recipe.toml"
    return parse_settings(Recipe, read_toml(path), str(path))
