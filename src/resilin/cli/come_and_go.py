"""Starting a run whose workers come and go, and telling how it ended; for several commands."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import typer

from resilin.cli.arguments import RunArguments

if TYPE_CHECKING:
    from collections.abc import Callable

    from resilin.cluster.place import Place
    from resilin.cluster.starter import Starter
    from resilin.run.settings import RunSettings


def come_and_go(settings: RunSettings, path: Path, given: RunArguments) -> None:
    """Take part in a run that may come and go as this process is meant to, and see it through.

    Raises:
        typer.Exit: with the run's exit code.
    """
    from resilin.cluster.position import position
    from resilin.config import UserError
    from resilin.run.elastic_outer import take_part

    place, wanted = position(), settings.parallel.workers
    if place is not None and wanted:
        raise UserError(
            f"this process is worker {place.rank} of {place.workers} already: torchrun or srun started it. Leave out "
            f"--workers (parallel.workers = {wanted}), or start it without them"
        )
    if place is not None:
        settings = settings.model_copy(
            update={"parallel": settings.parallel.model_copy(update={"workers": place.workers})}
        )
        raise typer.Exit(
            take_part(place, settings, path, lambda starter, where: see_through(settings, path, given, starter, where))
        )
    if wanted < 1:
        raise UserError(
            "cluster.elastic starts its workers itself: say how many with --workers (parallel.workers); on several "
            "machines see `resilin cluster serve`"
        )
    raise typer.Exit(see_through(settings, path, given))


def see_through(
    settings: RunSettings,
    path: Path,
    given: RunArguments,
    starter: Callable[[Path], Starter] | None = None,
    where: Place | None = None,
) -> int:
    """Launch a run, tell how it ended, and give its exit code."""
    from resilin.cluster.local import worker_command
    from resilin.cluster.process import get_ready

    if starter is None:
        get_ready(worker_command())  # beside what is imported here
    from resilin.run.elastic_start import launch
    from resilin.run.told_outcome import ToldOutcome

    told = ToldOutcome()
    ended = launch(
        settings,
        path,
        worker_command(),
        starter=starter,
        place=where,
        resume=given.resume,
        accept_changes=given.accept_changes,
        watch=lambda _, event: told(event),
    )
    if told.outcome is not None:
        from rich.console import Console

        from resilin.run.summary import summary

        Console().print(summary(path, told.outcome))
    if ended.message:
        typer.secho(f"error: {ended.message}", fg=typer.colors.RED, err=True)
    return ended.code
