"""Arguments that several commands share."""

from __future__ import annotations

from pathlib import Path

from resilin.config.errors import UserError


def split_settings(arguments: list[str]) -> tuple[Path | None, list[str]]:
    """A settings file and overrides, told apart by the `=` that every override has."""
    files = [argument for argument in arguments if "=" not in argument]
    if len(files) > 1:
        raise UserError(f"{files[1]!r} is neither an override (key=value) nor the only settings file ({files[0]!r})")
    return (Path(files[0]) if files else None), [argument for argument in arguments if "=" in argument]
