"""`resilin bench list | run | show`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer

from resilin.config.errors import UserError

app = typer.Typer(help="Measure against peers, and show what was measured.", no_args_is_help=True)

Folder = Annotated[Path, typer.Option(help="The folder of benchmark scripts.")]
HERE = Path("benchmarks")


def _scripts(folder: Path) -> dict[str, Path]:
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; run this in a source checkout, or name one with --folder")
    return {path.stem: path for path in sorted(folder.glob("*.py"))}


def _file(name: str, device: str) -> str:
    from resilin.bench.results import results_name

    return f"{results_name(name, device)}.json"


def _one(folder: Path, name: str) -> Path:
    scripts = _scripts(folder)
    if name not in scripts:
        raise UserError(f"no benchmark is called {name!r}; there are: {', '.join(scripts) or 'none'}")
    return scripts[name]


@app.command("list")
def list_benchmarks(folder: Folder = HERE) -> None:
    """List the benchmarks and what each measures."""
    import ast

    for name, path in _scripts(folder).items():
        text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        found = [device for device in ("cpu", "cuda") if (folder / "results" / _file(name, device)).exists()]
        done = f"measured on {' and '.join(found)}" if found else "not measured here yet"
        typer.echo(f"{name:14} {text.splitlines()[0] if text else ''} ({done})")


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def run(context: typer.Context, name: str, folder: Folder = HERE) -> None:
    """Run a benchmark; what follows its name is passed on to it."""
    raise typer.Exit(subprocess.call([sys.executable, str(_one(folder, name)), *context.args]))


@app.command()
def show(
    name: Annotated[str | None, typer.Argument(help="One benchmark, on every device; all when left out.")] = None,
    folder: Folder = HERE,
    readme: Annotated[
        Path | None, typer.Option(help="Replace the text between <!-- benchmarks --> marks of this file.")
    ] = None,
) -> None:
    """Print the committed results as a Markdown table."""
    from resilin.bench.readme import replace_between_marks
    from resilin.bench.results import markdown_table, read_report

    paths = sorted((folder / "results").glob("*.json"))
    if name is not None:
        paths = [path for path in paths if path.name in (_file(name, "cpu"), _file(name, "cuda"))]
    if not paths:
        raise UserError(
            f"{folder / 'results'}: no results{f' of {name!r}' if name else ''} yet: resilin bench run NAME"
        )
    table = markdown_table([read_report(path) for path in paths])
    if readme is not None:
        replace_between_marks(readme, "benchmarks", table)
    typer.echo(table, nl=False)
