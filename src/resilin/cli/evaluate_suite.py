"""`resilin evaluate --suite`: a whole table of evaluations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

if TYPE_CHECKING:
    from resilin.run.open_model import OpenedModel

PANEL = "A suite of evaluations"


@dataclass(frozen=True, slots=True)
class SuiteOptions:
    """Which suite, and where its results go."""

    suite: Annotated[
        Path | None, typer.Option(help="A TOML file of [[evaluations]] to run, all at once.", rich_help_panel=PANEL)
    ] = None
    part: Annotated[
        Literal["dev", "unseen"],
        typer.Option(help="Those that steer the work, or those looked at once, at its end.", rich_help_panel=PANEL),
    ] = "dev"
    before: Annotated[
        Path | None, typer.Option(help="An earlier report: shows what changed since.", rich_help_panel=PANEL)
    ] = None
    work: Annotated[
        Path | None,
        typer.Option(
            help="Folder of the piece of work: what is done, and whether it has looked at the unseen part. Default: "
            "the suite file without its ending.",
            rich_help_panel=PANEL,
        ),
    ] = None
    report: Annotated[
        Path | None,
        typer.Option(help="Where the report goes. Default: in the folder, by model and part.", rich_help_panel=PANEL),
    ] = None
    batch_rows: Annotated[int, typer.Option(min=1, help="Answers written side by side.", rich_help_panel=PANEL)] = 32

    def without_suite(self) -> list[str]:
        """The options that are given, though they mean nothing without a suite."""
        given = (f for f in fields(self) if f.name != "suite" and getattr(self, f.name) != f.default)
        return [f"--{f.name.replace('_', '-')}" for f in given]


def evaluate_suite(open_it: Callable[[], OpenedModel], given: SuiteOptions, batch_tokens: int, as_json: bool) -> None:
    """Run a suite's part on a model, opened when the settings are known to be good; write and print the report."""
    from rich.console import Console
    from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    from resilin.config import load_settings
    from resilin.data.write_shards import write_atomically
    from resilin.models.digest import weights_digest
    from resilin.posttrain.evaluations.evaluation import Progress, Subject, file_name
    from resilin.posttrain.evaluations.run import run_suite
    from resilin.posttrain.suite import Suite, read_report

    assert given.suite is not None
    suite = load_settings(Suite, given.suite)
    before = None if given.before is None else read_report(given.before)
    folder = given.work or given.suite.with_suffix("")
    opened = open_it()
    subject = Subject(
        opened.description,
        opened.model,
        opened.needed_tokenizer(),
        opened.end_ids,
        weights_digest(opened.model),
        given.batch_rows,
        batch_tokens,
    )
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    try:
        with Bar(*columns, console=Console(stderr=True), transient=True) as bar:

            def watch(name: str) -> Progress:
                task = bar.add_task(name, total=1.0)
                return lambda share: bar.update(task, completed=share)

            found = run_suite(suite, subject, given.part, folder, watch)
    except KeyboardInterrupt:
        typer.secho(f"{folder}: stopped; the same command goes on from here", fg=typer.colors.YELLOW, err=True)
        raise
    path = given.report or folder / f"{file_name(subject.name)}-{subject.weights[:8]}-{given.part}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    text = found.model_dump_json(indent=2)
    write_atomically(path, f"{text}\n".encode())
    typer.echo(text if as_json else found.text(before))
    typer.secho(f"report: {path}", err=True, dim=True)
