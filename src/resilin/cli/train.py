"""`resilin train`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from resilin.cli.arguments import split_settings

if TYPE_CHECKING:
    from resilin.run.run import Outcome

EXIT_FAILED = 3


def train(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(metavar="[SETTINGS.toml] [KEY=VALUE]...", help="A settings file and dotted overrides."),
    ] = None,
    folder: Annotated[Path | None, typer.Option(help="Where the run lives. Default: runs/<name>.")] = None,
    resume: Annotated[
        bool, typer.Option(help="Continue the run in the folder; start one where there is none.")
    ] = False,
    print_config: Annotated[bool, typer.Option(help="Write the complete resolved settings and stop.")] = False,
    accept_changes: Annotated[
        bool, typer.Option(help="With --resume: go on although settings that decide what is learned have changed.")
    ] = False,
) -> None:
    """Train a model, with progress, evaluation and checkpoints.

    Ctrl-C finishes the step, saves and exits with 130; --resume then goes on as if it had never stopped, to the bit.
    A loss that is not finite stops the run with exit code 3 and names the batch (train.non_finite=skip goes on).

    \b
    resilin train examples/shakespeare.toml
    resilin train run.toml train.steps=200 optimizer.lr=3e-4 --folder runs/trial
    resilin train run.toml --resume
    resilin train run.toml --print-config > complete.toml
    """
    from resilin.config import load_settings, settings_to_toml
    from resilin.run.settings import RunSettings

    file, overrides = split_settings(arguments or [])
    settings = load_settings(RunSettings, file, overrides)
    if print_config:
        typer.echo(settings_to_toml(settings), nl=False)
        return
    from resilin.run.start import start_run

    path = folder or settings.default_folder()
    _, outcome = start_run(settings, path, resume=resume, accept_changes=accept_changes)
    finish(path, outcome)


def finish(path: Path, outcome: Outcome) -> None:
    """Say how a run ended, and end the process as it should.

    Raises:
        typer.Exit: it was interrupted (130), or failed (3).
    """
    from rich.console import Console

    from resilin.run.summary import summary

    Console().print(summary(path, outcome))
    if outcome.reason == "interrupted":
        raise typer.Exit(130)
    if outcome.reason == "failed":
        typer.secho(f"error: {outcome.message}", fg=typer.colors.RED, err=True)
        raise typer.Exit(EXIT_FAILED)
