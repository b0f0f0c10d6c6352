"""Labelled files: a folder for each class, or a JSONL list."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError

from resilin.config import Settings
from resilin.data.errors import DataError, Problem

OnError = Literal["stop", "skip"]


@dataclass(frozen=True, slots=True)
class LabelledFile:
    """A file and the name of its class."""

    path: Path
    label: str


def class_folders(root: Path, endings: Sequence[str]) -> list[LabelledFile]:
    """Files of `root/<class>/**`, classes and files by name.

    Raises:
        DataError: where there is no folder, no class, or a class without a file.
    """
    if not root.is_dir():
        raise DataError(f"{root}: is not a folder; one folder for each class was expected in it")
    folders = sorted(p for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))
    found = []
    for folder in folders:
        files = sorted(
            p for p in folder.rglob("*") if p.suffix.lower() in endings and not p.name.startswith(".") and p.is_file()
        )
        if not files:
            raise DataError(f"{folder}: has no file ending in {', '.join(endings)}: every folder in {root} is a class")
        found += [LabelledFile(path, folder.name) for path in files]
    if not found:
        raise DataError(f"{root}: has no folder in it; one folder for each class was expected")
    return found


class Entry(Settings):
    """A line of a list: a stretch of a file, and its class."""

    file: str
    label: str | int
    start: Annotated[float, Field(ge=0)] = 0.0
    """Seconds."""
    end: Annotated[float, Field(gt=0)] | None = None
    """Seconds; left out, the file's end."""
    box: tuple[float, float, float, float] | None = None
    """Only this part of each frame: left, top, right, bottom, as fractions."""
    reverse: bool = False
    """Play it backwards."""


def read_list(path: Path) -> list[Entry]:
    """The entries of a JSONL list; `file` is relative to the list's own folder.

    Raises:
        DataError: naming the line, what is wrong with it, and what was expected.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as a JSONL list: {error}") from None
    entries = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            tree: Any = json.loads(line)
            entry = Entry.model_validate(tree)
        except json.JSONDecodeError as error:
            raise DataError(f"{where}: not valid JSON: {error}") from None
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            key = ".".join(str(part) for part in first["loc"])
            raise DataError(
                f'{where}: {key + ": " if key else ""}{first["msg"]}; expected {{"file": ..., "label": ..., '
                '"start": seconds, "end": seconds}}'
            ) from None
        if entry.end is not None and entry.end <= entry.start:
            raise DataError(f"{where}: end ({entry.end:g} s) is not after start ({entry.start:g} s)")
        if entry.box is not None:
            left, top, right, bottom = entry.box
            if not (0 <= left < right <= 1 and 0 <= top < bottom <= 1):
                raise DataError(f"{where}: box {list(entry.box)} should be [left, top, right, bottom] within 0 to 1")
        entries.append(entry)
    if not entries:
        raise DataError(f"{path}: holds no entry")
    return entries


def settle(problems: Sequence[Problem], total: int, on_error: OnError, what: str) -> None:
    """Stop at the first problem, or say how many files were left out, by kind.

    Raises:
        DataError: on "stop", the first problem; on "skip", when nothing is left.
    """
    if not problems:
        return
    if on_error == "stop":
        text = f"{problems[0].where}: {problems[0].what}"
        more = f" ({len(problems) - 1} more like it)" if len(problems) > 1 else ""
        raise DataError(f"{text}{more}; remove it, or set source.on_error = 'skip' to leave such files out")
    if len(problems) == total:
        raise DataError(f"none of {total} {what} can be used; the first, {problems[0].where}: {problems[0].what}")
    kinds = Counter(problem.kind for problem in problems)
    said = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))
    sys.stderr.write(
        f"resilin: {len(problems)} of {total} {what} left out ({said}); the first, {problems[0].where}: "
        f"{problems[0].what}\n"
    )


def number_classes(labels: Sequence[str | int]) -> tuple[tuple[str, ...], list[int]]:
    """Class names in order (numbers by value, names by alphabet) and each sample's class."""
    numbers = all(isinstance(label, int) for label in labels)
    names = sorted(set(labels)) if numbers else sorted({str(label) for label in labels})
    place = {str(name): index for index, name in enumerate(names)}
    return tuple(str(name) for name in names), [place[str(label)] for label in labels]
