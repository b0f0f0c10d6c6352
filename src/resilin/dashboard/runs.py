"""The runs at or below a folder."""

from __future__ import annotations

from pathlib import Path

from resilin.config import UserError

_DEPTH = 3
_MOST = 500


def runs_at(folder: Path) -> dict[str, Path]:
    """By name the folders of runs, newest event first; a folder that has none yet is taken for a run that is to begin.

    Args:
        folder: a run's, or one with runs some levels below it.

    Raises:
        UserError: there is no such folder.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: there is no such folder; a run's folder was expected, such as runs/shakespeare")
    if any((folder / name).exists() for name in ("events.jsonl", "settings.toml", "workers")):
        return {folder.resolve().name: folder}
    found: list[tuple[float, Path]] = []
    for depth in range(1, _DEPTH + 1):
        for log in folder.glob("/".join(["*"] * depth + ["events.jsonl"])):
            if log.is_file() and log.resolve().is_relative_to(folder.resolve()):
                found.append((log.stat().st_mtime, log.parent))
    if not found:
        return {folder.resolve().name: folder}
    found.sort(key=lambda one: -one[0])
    return {str(path.relative_to(folder)): path for _, path in found[:_MOST]}
