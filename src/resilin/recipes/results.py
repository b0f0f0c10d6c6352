"""`results.json`: everything a reproduction found, and on what; README and plot are made from it alone."""

from __future__ import annotations

import json
import math
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

from resilin.config import Settings, parse_settings
from resilin.config.errors import SettingsError
from resilin.recipes.cells import Cell
from resilin.recipes.findings import Findings, Metrics, RunRecord
from resilin.recipes.recipe import PaperFigure, Recipe, Value

SCHEMA = 1


class Machine(Settings):
    """What the runs were made on."""

    cpu: str
    cores: int
    memory_gib: float
    gpu: str = ""
    system: str = ""


class RunSummary(Settings):
    """One cell and how its run ended."""

    grid: str
    arm: str
    axes: dict[str, Value]
    seed: int
    hash: str
    status: Literal["finished", "non-finite"]
    stopped_at: int | None = None
    non_embedding: int = 0
    initial: Metrics
    final: Metrics
    wall_seconds: float


class Results(Settings):
    """A whole `results.json`."""

    schema_version: int = SCHEMA
    slug: str
    title: str
    claim: str
    paper: str
    """Title, year and arXiv identifier."""
    paper_figures: tuple[PaperFigure, ...]
    preset: str
    command: str
    seeds: tuple[int, ...]
    commit: str
    """Of the checkout; "+changes" where files differed from it; empty outside a checkout."""
    versions: dict[str, str]
    code: tuple[str, ...] = ()
    """Digests of the package's source that the runs were made by: more than one where it changed in between."""
    machine: Machine
    processes: int
    threads: int
    wall_seconds: float
    """Of this reproduction; runs that were read back cost nothing."""
    training_seconds: float
    """Of all runs, whenever they were made."""
    settings: dict[str, Any]
    """Of the preset: the settings shared by its runs, before grids, arms and axes."""
    findings: Findings
    runs: tuple[RunSummary, ...]


def versions() -> dict[str, str]:
    """Of what decides a run's numbers, and the Python that ran it."""
    found = {"python": platform.python_version()}
    for package in ("resilin", "torch", "numpy", "tokenizers"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def hashed_versions() -> dict[str, str]:
    """The versions that a run's hash covers: a run made by another one is made again."""
    found = versions()
    return {name: found[name] for name in ("resilin", "torch")}


def machine() -> Machine:
    """This machine."""
    import torch

    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [
            line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        ]
        cpu = names[0] if names else cpu
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return Machine(
        cpu=cpu,
        cores=len(os.sched_getaffinity(0)),
        memory_gib=round(pages / 2**30, 1),
        gpu=torch.cuda.get_device_name(0) if torch.cuda.is_available() else "",
        system=f"{platform.system()} {platform.machine()}",
    )


def commit(folder: Path) -> str:
    """The checkout's commit, marked where the working tree's source or recipes differ; "" outside a checkout."""

    def git(*words: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(folder), *words], capture_output=True, text=True, check=True, timeout=30
        )
        return done.stdout.strip()

    try:
        root = git("rev-parse", "--show-toplevel")
        head = git("rev-parse", "HEAD")
        changed = git("status", "--porcelain", "--", f"{root}/src", str(folder / "recipe.toml"))
    except (OSError, subprocess.SubprocessError):
        return ""
    return head + ("+changes" if changed else "")


def without_non_finite(value: Any) -> Any:
    """A JSON tree in which numbers that are not finite are null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(k): without_non_finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [without_non_finite(v) for v in value]
    return value


def summaries(cells: Sequence[Cell], hashes: Sequence[str], records: Mapping[str, RunRecord]) -> tuple[RunSummary, ...]:
    """One line for each cell."""
    found = []
    for cell, name in zip(cells, hashes, strict=True):
        r = records[name]
        found.append(
            RunSummary(
                grid=cell.grid,
                arm=cell.arm,
                axes=cell.axes,
                seed=cell.seed,
                hash=name,
                status=r.status,
                stopped_at=r.stopped_at,
                non_embedding=r.non_embedding,
                initial=r.initial,
                final=r.final,
                wall_seconds=r.wall_seconds,
            )
        )
    return tuple(found)


def paper_line(recipe: Recipe) -> str:
    """The paper in one line."""
    return f"{recipe.paper.title} ({recipe.paper.year}), arXiv:{recipe.paper.arxiv}"


def results_file(folder: Path, preset: str) -> Path:
    """Where a preset's results lie in a recipe's (or an output) folder."""
    return folder / ("results.json" if preset == "cpu" else f"results-{preset}.json")


def write_results(path: Path, results: Results) -> None:
    """Write them so that the file is either whole or as it was."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    tree = without_non_finite(results.model_dump(mode="json"))
    temporary.write_text(json.dumps(tree, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    temporary.replace(path)


def read_results(path: Path) -> Results | None:
    """The results of a file; None where there is none.

    Raises:
        SettingsError: for a file that is not one of results.
    """
    if not path.exists():
        return None
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise SettingsError(f"{path}: not valid JSON: {error}") from None
    return parse_settings(Results, tree, str(path))
