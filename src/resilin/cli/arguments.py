"""Arguments that several commands share."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from resilin.config.errors import UserError


def split_settings(arguments: list[str]) -> tuple[Path | None, list[str]]:
    """A settings file and overrides, told apart by the `=` that every override has."""
    files = [argument for argument in arguments if "=" not in argument]
    if len(files) > 1:
        raise UserError(f"{files[1]!r} is neither an override (key=value) nor the only settings file ({files[0]!r})")
    return (Path(files[0]) if files else None), [argument for argument in arguments if "=" in argument]


@dataclass(frozen=True, slots=True)
class RunArguments:
    """What every command that trains is given."""

    arguments: Annotated[
        list[str] | None,
        typer.Argument(metavar="[SETTINGS.toml] [KEY=VALUE]...", help="A settings file and dotted overrides."),
    ] = None
    folder: Annotated[Path | None, typer.Option(help="Where the run lives. Default: runs/<name>.")] = None
    resume: Annotated[bool, typer.Option(help="Continue the run in the folder; start one where there is none.")] = False
    print_config: Annotated[bool, typer.Option(help="Write the complete resolved settings and stop.")] = False
    accept_changes: Annotated[
        bool, typer.Option(help="With --resume: go on although settings that decide what is learned have changed.")
    ] = False

    workers: Annotated[
        int | None, typer.Option(min=1, help="Processes to start on this machine: parallel.workers.")
    ] = None

    def split(self) -> tuple[Path | None, list[str]]:
        """The settings file and the overrides."""
        file, overrides = split_settings(self.arguments or [])
        return file, overrides if self.workers is None else [*overrides, f"parallel.workers={self.workers}"]
