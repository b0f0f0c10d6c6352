"""`resilin reproduce`: the runs of a preset, its analysis, and the files that state what was found."""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from resilin.config import SettingsError
from resilin.config.settings import closest
from resilin.data.settings import SourceContext
from resilin.recipes.cells import Cell, cells, hashed
from resilin.recipes.code_digest import code_digest
from resilin.recipes.execute import Job, forget, read_record
from resilin.recipes.findings import Findings, RunRecord, Study, Trial
from resilin.recipes.picture import draw
from resilin.recipes.readme import picture_name, write_readme
from resilin.recipes.recipe import Preset, Recipe, load_recipe
from resilin.recipes.results import (
    Results,
    commit,
    hashed_versions,
    machine,
    paper_line,
    results_file,
    summaries,
    versions,
    write_results,
)
from resilin.recipes.stage import forget_stages
from resilin.recipes.workers import train_all
from resilin.run.settings import RunSettings

Analysis = Callable[[Study], Findings]


@dataclass(frozen=True, slots=True)
class Request:
    """What to reproduce, and how.

    Attributes:
        folder: the recipe's.
        preset: one of its presets.
        runs: where runs live; theirs are in `<runs>/<slug>/<hash>`.
        seeds: only the first this many of each grid's seeds; None: all.
        overrides: `dotted.key=value` laid over every run's settings.
        fresh: train everything again.
        processes: in place of the preset's.
    """

    folder: Path
    preset: str = "cpu"
    runs: Path = Path("runs/recipes")
    seeds: int | None = None
    overrides: tuple[str, ...] = ()
    fresh: bool = False
    processes: int | None = None

    @property
    def slug(self) -> str:
        """The recipe's name."""
        return self.folder.name

    @property
    def whole(self) -> bool:
        """Whether this is the recipe as published, whose results belong in its folder."""
        return self.seeds is None and not self.overrides

    @property
    def output(self) -> Path:
        """Where results go: a reduced or changed reproduction must not replace the recipe's own."""
        return self.folder if self.whole else self.runs / self.slug

    @property
    def command(self) -> str:
        """The command that asks for this."""
        words = ["resilin reproduce", self.slug]
        words += [f"--preset {self.preset}"] if self.preset != "cpu" else []
        words += [f"--seeds {self.seeds}"] if self.seeds is not None else []
        return " ".join([*words, *self.overrides])


def load_analysis(path: str) -> Analysis:
    """The function that an import path names.

    Raises:
        SettingsError: saying what cannot be imported.
    """
    module_name, _, name = path.partition(":")
    try:
        found = getattr(importlib.import_module(module_name), name)
    except ImportError as error:
        raise SettingsError(f"analysis = {path!r}: module {module_name} cannot be imported ({error})") from None
    except AttributeError:
        raise SettingsError(f"analysis = {path!r}: module {module_name} has no {name!r}") from None
    if not callable(found):
        raise SettingsError(f"analysis = {path!r}: is not a function")
    return found  # type: ignore[no-any-return]


def _preset(recipe: Recipe, name: str) -> Preset:
    if name not in recipe.presets:
        near = closest(name, recipe.presets)
        hint = f"did you mean {near!r}?" if near else f"this recipe has {', '.join(recipe.presets)}"
        raise SettingsError(f"--preset {name}: no such preset; {hint}")
    preset = recipe.preset(name)
    if preset.needs == "cuda":
        import torch

        if not torch.cuda.is_available():
            raise SettingsError(f"--preset {name} needs a CUDA device and torch sees none here; try --preset cpu")
    return preset


def data_digest(settings: RunSettings) -> str:
    """The content hash of a run's training data."""
    source = settings.source.build(SourceContext(settings.seed, "train", settings.train.batch_size))
    return str(getattr(source, "digest", ""))


def cells_of(recipe: Recipe, request: Request) -> list[Cell]:
    """The cells a request asks for."""
    found = list(cells(recipe, request.preset, overrides=request.overrides))
    if request.seeds is None:
        return found
    if request.seeds < 1:
        raise SettingsError(f"--seeds {request.seeds}: at least one seed is needed")
    first: dict[str, list[int]] = {}
    for cell in found:
        chosen = first.setdefault(cell.grid, [])
        if cell.seed not in chosen:
            chosen.append(cell.seed)
    return [cell for cell in found if cell.seed in first[cell.grid][: request.seeds]]


@dataclass(frozen=True, slots=True)
class Trained:
    """The runs of some cells: their hashes in the cells' order, and the records by hash."""

    hashes: list[str]
    records: dict[str, RunRecord]

    def study(self, slug: str, preset: str, recipe: Recipe, found: Sequence[Cell]) -> Study:
        """The trials an analysis reads."""
        trials = tuple(
            Trial(cell.grid, cell.arm, dict(cell.axes), cell.seed, self.records[name])
            for cell, name in zip(found, self.hashes, strict=True)
        )
        return Study(slug, preset, trials, recipe)


def train_cells(
    found: Sequence[Cell],
    recipe: Recipe,
    folder: Path,
    console: Console,
    *,
    processes: int = 1,
    threads: int = 0,
    fresh: bool = False,
) -> Trained | None:
    """Read back or make the run of every cell; cells that ask for the same share one.

    Args:
        found: the cells.
        recipe: whose title is shown and whose `series` records keep.
        folder: holds a folder for each run.
        console: for progress.
        processes: worker processes at most.
        threads: torch threads of each; 0: this machine's cores shared out evenly.
        fresh: remove earlier runs first, those that they start from included.

    Returns:
        None where the user interrupted.
    """
    hashes = hashed(found, data_digest, hashed_versions())
    jobs: dict[str, Job] = {}
    for cell, name in zip(found, hashes, strict=True):
        jobs.setdefault(name, Job(name, str(cell), cell.settings, folder / name, recipe.series, recipe.runner))
    if fresh:
        forget(list(jobs.values()))
        for job in jobs.values():
            forget_stages(job.settings)
    records = {name: record for name, job in jobs.items() if (record := read_record(job)) is not None}
    missing = [job for name, job in jobs.items() if name not in records]
    console.print(f"[bold]{recipe.title}[/bold]: {len(jobs)} runs, {len(records)} read back, {len(missing)} to train")
    older = sum(record.code != code_digest() for record in records.values())
    if older:
        console.print(
            f"{older} of the runs read back were made by other code of the same version; --fresh makes all anew"
        )
    if missing:
        trained = train_all(missing, min(processes, len(missing)), threads, folder / "workers.log", console)
        if trained is None:
            return None
        records |= trained
    return Trained(hashes, records)


def reproduce(request: Request, console: Console) -> Results | None:
    """Make the runs that are missing, analyse all, and write results, picture and README.

    Returns:
        The results; None where the user interrupted.

    Raises:
        SettingsError: for a recipe, preset or request that cannot be used, before the first run.
        RunFailedError: for a run that ended otherwise than by a non-finite number.
    """
    began = time.perf_counter()
    recipe = load_recipe(request.folder)
    preset = _preset(recipe, request.preset)
    analyse = load_analysis(recipe.analysis)
    found = cells_of(recipe, request)
    processes = request.processes or preset.processes
    folder = request.runs / request.slug
    trained = train_cells(
        found, recipe, folder, console, processes=processes, threads=preset.threads, fresh=request.fresh
    )
    if trained is None:
        return None
    study = trained.study(request.slug, request.preset, recipe, found)
    results = Results(
        slug=request.slug,
        title=recipe.title,
        claim=recipe.claim,
        paper=paper_line(recipe),
        paper_figures=recipe.paper.figures,
        preset=request.preset,
        command=request.command,
        seeds=study.seeds(),
        commit=commit(request.folder.resolve()),
        versions=versions(),
        code=tuple(sorted({r.code for r in trained.records.values()})),
        machine=machine(),
        processes=processes,
        threads=preset.threads,
        wall_seconds=round(time.perf_counter() - began, 1),
        training_seconds=round(sum(r.wall_seconds for r in trained.records.values()), 1),
        settings=recipe.settings | {"preset": preset.settings},
        findings=analyse(study),
        runs=summaries(found, trained.hashes, trained.records),
    )
    write_results(results_file(request.output, request.preset), results)
    draw(results.findings.plots, request.output / picture_name(request.preset))
    write_readme(request.output)
    return results
