"""A stability study of your own model from Python: sizes x learning rates x interventions x seeds.

    study = sweep(
        base={"source": {...}, "train": {"steps": 500}},
        sizes={"small": {"model": {"hidden_size": 64}}, "large": {"model": {"hidden_size": 128}}},
        lrs=(1e-3, 1e-2, 1e-1),
        patches={"none": {}, "qk_norm": {"model": {"qk_norm": "layer"}}},
        seeds=(0, 1, 2),
        runs=Path("runs/stability"),
    )

Its trials carry arm (the patch), `axes["size"]`, `axes["lr"]`, seed and record, and feed `resilin.evaluate.stability`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console

from resilin.recipes.cells import cells
from resilin.recipes.findings import Study
from resilin.recipes.recipe import Axis, Grid, Paper, Patch, Preset, Recipe
from resilin.recipes.reproduce import train_cells


def sweep_recipe(
    base: Patch,
    sizes: Mapping[str, Patch],
    lrs: Sequence[float],
    patches: Mapping[str, Patch],
    seeds: Sequence[int],
    *,
    lr_key: str = "optimizer.lr",
    series: Sequence[str] = ("loss", "grad_norm", "probe/*"),
) -> Recipe:
    """The sweep as a recipe with the one preset `cpu` and the one grid `sweep`."""
    grid = Grid(axes={"size": Axis(points=dict(sizes)), "lr": Axis(key=lr_key, values=tuple(lrs))})
    return Recipe(
        title="Stability sweep",
        claim="Which learning rates train at which size.",
        paper=Paper(title="Small-scale proxies for large-scale instabilities", year=2023, arxiv="2309.14322"),
        settings=base,
        arms=dict(patches),
        series=tuple(series),
        presets={"cpu": Preset(seeds=tuple(seeds), grids={"sweep": grid})},
    )


def sweep(
    base: Patch,
    sizes: Mapping[str, Patch],
    lrs: Sequence[float],
    patches: Mapping[str, Patch],
    seeds: Sequence[int],
    *,
    runs: Path,
    lr_key: str = "optimizer.lr",
    series: Sequence[str] = ("loss", "grad_norm", "probe/*"),
    processes: int = 1,
    threads: int = 0,
    console: Console | None = None,
) -> Study | None:
    """Train the grid; runs made before are read back, interrupted ones resume.

    Args:
        base: settings of a run, as a tree; evaluation must be on, for the final loss.
        sizes: patches by name.
        lrs: peak learning rates, set at `lr_key`.
        patches: interventions by name; {} is the base as it is.
        seeds: of each combination.
        runs: folder that holds a folder for each run.
        lr_key: dotted setting of the learning rate; another one where the optimizer is wrapped.
        series: logged quantities that records keep, as shell patterns.
        processes: worker processes.
        threads: torch threads of each; 0: this machine's cores shared out evenly.
        console: where progress is shown.

    Returns:
        All trials; None where the user interrupted.
    """
    recipe = sweep_recipe(base, sizes, lrs, patches, seeds, lr_key=lr_key, series=series)
    found = list(cells(recipe, "cpu"))
    trained = train_cells(found, recipe, runs, console or Console(), processes=processes, threads=threads)
    return trained.study("sweep", "cpu", recipe, found) if trained is not None else None
