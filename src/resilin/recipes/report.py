"""What the recipe commands print."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from resilin.config import SettingsError
from resilin.config.settings import closest
from resilin.models.decoder_settings import DecoderSettings
from resilin.recipes.cells import cells, check
from resilin.recipes.find import slugs
from resilin.recipes.readme import PRESETS, figure, measured, verdict
from resilin.recipes.recipe import load_recipe
from resilin.recipes.results import Results, paper_line, read_results, results_file


def list_table(folder: Path) -> Table:
    """All recipes of a folder."""
    table = Table(title=f"Recipes in {folder}")
    table.add_column("recipe", no_wrap=True)
    for heading in ("paper", "presets", "last result (cpu)"):
        table.add_column(heading)
    for slug in slugs(folder):
        recipe = load_recipe(folder / slug)
        results = read_results(results_file(folder / slug, "cpu"))
        said = escape(verdict(results).replace("**", "")) if results is not None else "not run yet"
        table.add_row(slug, escape(paper_line(recipe)), ", ".join(recipe.presets), said)
    return table


def show_recipe(folder: Path, preset: str | None, console: Console) -> None:
    """One recipe; with a preset, its runs too."""
    recipe = load_recipe(folder)
    if preset is not None and preset not in recipe.presets:
        near = closest(preset, recipe.presets)
        hint = f"did you mean {near!r}?" if near else f"this recipe has {', '.join(recipe.presets)}"
        raise SettingsError(f"--preset {preset}: no such preset; {hint}")
    check(recipe)
    console.print(f"[bold]{escape(recipe.title)}[/bold]\n{escape(paper_line(recipe))}\n\n{escape(recipe.claim)}\n")
    for paper in recipe.paper.figures:
        console.print(f"  - {escape(paper.finding)}: [bold]{escape(paper.figure)}[/bold]", highlight=False)
    table = Table("preset", "needs", "grids", "cells", "seeds", "steps", "largest model", title="Presets")
    for name, chosen in recipe.presets.items():
        found = list(cells(recipe, name))
        sizes = [c.settings.model for c in found if isinstance(c.settings.model, DecoderSettings)]
        largest = max(sizes, key=lambda s: s.hidden_size**2 * s.layers, default=None)
        steps = sorted({c.settings.train.steps for c in found})
        table.add_row(
            name, chosen.needs, str(len(recipe.grids(name))), str(len(found)), str(len({c.seed for c in found})),
            f"{steps[0]}" if len(steps) == 1 else f"{steps[0]}-{steps[-1]}",
            f"{largest.layers} layers of {largest.hidden_size}" if largest is not None else "-",
        )  # fmt: skip
    console.print(table)
    if preset is not None:
        for cell in cells(recipe, preset):
            console.print(f"  {cell}", highlight=False, markup=False)
    for kind in PRESETS:
        results = read_results(results_file(folder, kind))
        if results is not None:
            print_results(results, folder, console)


def print_results(results: Results, folder: Path, console: Console) -> None:
    """Figures, claims and where the files are."""
    findings = results.findings
    if findings.rows:
        with_paper = any(row.paper for row in findings.rows)
        rows = Table("figure", "measured", "seeds", *(["paper"] if with_paper else []), title=results.title)
        for row in findings.rows:
            rows.add_row(escape(row.name), measured(row), str(row.count), *([escape(row.paper)] if with_paper else []))
        console.print(rows)
    for table in findings.tables:
        shown = Table(*table.columns, title=table.title, caption=table.note or None)
        for cells_of_row in table.rows:
            shown.add_row(*(escape(figure(cell)) for cell in cells_of_row))
        console.print(shown)
    for claim in findings.claims:
        mark = "[green]holds[/green]" if claim.holds else "[bold red]DOES NOT HOLD[/bold red]"
        console.print(f"{mark}  {escape(claim.statement)}\n       {escape(claim.evidence)}", highlight=False)
    for note in findings.notes:
        console.print(f"note   {escape(note)}", highlight=False)
    console.print(f"\n[bold]{escape(verdict(results).replace('**', ''))}[/bold]", highlight=False)
    console.print(f"preset {results.preset}: {results_file(folder, results.preset)}", highlight=False, markup=False)
