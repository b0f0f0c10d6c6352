"""The generated part of a recipe's README, from its results files alone."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from resilin.config import SettingsError
from resilin.recipes.findings import Row, Table
from resilin.recipes.results import Results, read_results, results_file

BEGIN, END = "<!-- results -->", "<!-- /results -->"
PRESETS = ("cpu", "gpu", "paper")


def figure(value: str | float | int | None) -> str:
    """A cell: numbers with four significant digits, "-" where there is none."""
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value).replace("|", "\\|").replace("\n", " ")


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str | float | int | None]]) -> str:
    """A table in Markdown."""
    lines = ["| " + " | ".join(figure(c) for c in columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(figure(cell) for cell in row) + " |" for row in rows]
    return "\n".join(lines)


def measured(row: Row) -> str:
    """A row's figure with its spread and unit."""
    if row.value is None:
        return "not finite"
    spread = f" ± {row.spread:.2g}" if row.spread is not None else ""
    return f"{row.value:.4g}{spread}{f' {row.unit}' if row.unit else ''}"


def _table(table: Table) -> str:
    note = f"\n\n{table.note}" if table.note else ""
    return f"**{table.title}**\n\n{markdown_table(table.columns, table.rows)}{note}"


def verdict(results: Results) -> str:
    """One sentence: how many of the claims hold, and which do not."""
    claims = results.findings.claims
    missing = [c.name for c in claims if not c.holds]
    if not claims:
        return "No claim was tested."
    if not missing:
        return f"All {len(claims)} claims hold in these runs."
    return f"{len(claims) - len(missing)} of {len(claims)} claims hold; **not seen here: {', '.join(missing)}.**"


def section(results: Results, picture: str = "") -> str:
    """Everything about one preset's results."""
    findings = results.findings
    machine = results.machine
    parts = [
        f"### Measured, preset `{results.preset}`",
        verdict(results),
        markdown_table(
            ("claim", "holds", "evidence"),
            [(c.statement, "yes" if c.holds else "**no**", c.evidence) for c in findings.claims],
        ),
    ]
    if findings.rows:
        with_paper = any(row.paper for row in findings.rows)
        columns = ("figure", "measured (mean ± standard deviation over seeds)", "seeds")
        rows = [(r.name, measured(r), r.count) + ((r.paper,) if with_paper else ()) for r in findings.rows]
        parts.append(markdown_table((*columns, "paper") if with_paper else columns, rows))
    parts += [_table(table) for table in findings.tables]
    if findings.notes:
        parts.append("\n".join(f"- {note}" for note in findings.notes))
    if picture:
        parts.append(f"![{results.title}]({picture})")
    distinct = {run.hash for run in results.runs}
    parts.append(
        f"Made by `{results.command}`: {len(distinct)} runs, seeds {', '.join(map(str, results.seeds))}, "
        f"which took {results.training_seconds / 60:.0f} minutes one by one (with whatever else the machine did), "
        f"each on {results.threads or 'all'} thread{'' if results.threads == 1 else 's'} of "
        f"{machine.gpu or machine.cpu} ({machine.cores} cores); "
        + ", ".join(f"{name} {number}" for name, number in results.versions.items())
        + (f"; commit `{results.commit}`" if results.commit else "")
        + (f"; the runs were made by {len(results.code)} states of the code" if len(results.code) > 1 else "")
        + "."
    )
    return "\n\n".join(parts)


def generated(found: Sequence[Results], pictures: Sequence[str]) -> str:
    """The text between the markers."""
    first = found[0]
    parts = []
    if first.paper_figures:
        parts.append(f"### What the paper reports\n\n{first.paper}\n\n" + markdown_table(
            ("finding", "figure"), [(p.finding, p.figure) for p in first.paper_figures]
        ))  # fmt: skip
    parts += [section(results, picture) for results, picture in zip(found, pictures, strict=True)]
    return "\n\n".join(parts)


def write_readme(folder: Path) -> Path | None:
    """Bring a recipe's README up to date with the results files beside it.

    Returns:
        The README; None where there are no results.

    Raises:
        SettingsError: where the README lacks the markers.
    """
    found = [r for r in (read_results(results_file(folder, preset)) for preset in PRESETS) if r is not None]
    if not found:
        return None
    path = folder / "README.md"
    text = path.read_text(encoding="utf-8") if path.exists() else f"# {found[0].title}\n\n{BEGIN}\n{END}\n"
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise SettingsError(f"{path}: should hold the lines {BEGIN} and {END} once each, in this order")
    pictures = [name if (folder / (name := picture_name(r.preset))).exists() else "" for r in found]
    body = f"{BEGIN}\n{generated(found, pictures)}\n{END}"
    path.write_text(re.sub(f"{BEGIN}.*{END}", lambda _: body, text, flags=re.DOTALL), encoding="utf-8")
    return path


def picture_name(preset: str) -> str:
    """The plot's file name."""
    return "plot.png" if preset == "cpu" else f"plot-{preset}.png"
