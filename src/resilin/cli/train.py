"""`resilin train`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from resilin.cli.arguments import RunArguments
from resilin.cli.option_groups import with_option_groups

if TYPE_CHECKING:
    from resilin.cluster.position import Position
    from resilin.run.run import Outcome
    from resilin.run.settings import RunSettings

EXIT_FAILED = 3


@with_option_groups
def train(given: RunArguments) -> None:
    """Train a model, with progress, evaluation and checkpoints.

    Ctrl-C finishes the step, saves and exits with 130; --resume then goes on as if it had never stopped, to the bit.
    A loss that is not finite stops the run with exit code 3 and names the batch (train.non_finite=skip goes on).

    \b
    resilin train examples/shakespeare.toml
    resilin train run.toml train.steps=200 optimizer.lr=3e-4 --folder runs/trial
    resilin train run.toml --resume
    resilin train run.toml --print-config > complete.toml
    """
    from resilin.cluster.position import MEMBER
    from resilin.config import load_settings, settings_to_toml
    from resilin.run.settings import RunSettings

    if MEMBER in os.environ:  # one of the workers of an elastic run: the launcher has the settings
        from resilin.run.elastic_start import work

        work()
        return
    file, overrides = given.split()
    settings = load_settings(RunSettings, file, overrides)
    if given.print_config:
        typer.echo(settings_to_toml(settings), nl=False)
        return
    path = given.folder or settings.default_folder()
    if settings.cluster.elastic:
        from resilin.cli.come_and_go import come_and_go

        come_and_go(settings, path, given)
        return
    place = here_or_launched(settings, path)
    from resilin.run.start import start_run

    _, outcome = start_run(settings, path, resume=given.resume, accept_changes=given.accept_changes, place=place)
    finish(path, outcome, place)


def here_or_launched(settings: RunSettings, path: Path) -> Position | None:
    """Which worker this process is; where it is to start workers, it does, and ends when they have.

    Raises:
        typer.Exit: with the workers' exit code.
    """
    from resilin.cluster.failure import REPORT
    from resilin.cluster.local import end_with_launcher, run_workers, this_command
    from resilin.cluster.position import position
    from resilin.cluster.process import get_ready
    from resilin.config import UserError

    place, wanted = position(), settings.parallel.workers
    if REPORT in os.environ:  # one of those that this command started
        end_with_launcher()
        return place
    if place is not None and wanted:
        raise UserError(
            f"this process is worker {place.rank} of {place.workers} already: torchrun or srun started it and set "
            f"RANK or SLURM_PROCID. Leave out --workers (parallel.workers = {wanted}), or start it without them"
        )
    if place is not None or wanted < 2:
        return place
    get_ready(this_command())  # beside what is imported here
    from resilin.parallel.world import World

    degrees = settings.parallel.degrees(wanted)  # a wrong product is told before anything starts
    places = [World(degrees, rank).where for rank in range(wanted)]
    ended = run_workers(this_command(), places, path / "workers")
    if ended.message:
        typer.secho(f"error: {ended.message}", fg=typer.colors.RED, err=True)
    raise typer.Exit(ended.code)


def finish(path: Path, outcome: Outcome, place: Position | None = None) -> None:
    """Say how a run ended, and end the process as it should; of several workers the first speaks.

    Raises:
        typer.Exit: it was interrupted (130), or failed (3).
    """
    if place is None or place.rank == 0:
        from rich.console import Console

        from resilin.run.summary import summary

        Console().print(summary(path, outcome))
    if outcome.reason == "interrupted":
        raise typer.Exit(130)
    if outcome.reason == "failed":
        typer.secho(f"error: {outcome.message}", fg=typer.colors.RED, err=True)
        raise typer.Exit(EXIT_FAILED)
