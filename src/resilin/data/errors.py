"""What is said of data that cannot be used."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from resilin.config.errors import UserError


class DataError(UserError):
    """Data that cannot be used; its text names the file, the line or byte, what was expected and what to do."""


@dataclass(frozen=True, slots=True)
class Problem:
    """One piece of input that could not become a document.

    Attributes:
        kind: a short name to count by: "invalid UTF-8", "broken JSON", ...
        where: file, with the line or byte.
        what: what was wrong and what was expected.
    """

    kind: str
    where: str
    what: str

    def error(self) -> DataError:
        """The problem as an error that stops the work."""
        return DataError(f"{self.where}: {self.what}")


def inside(folder: Path, name: object) -> Path:
    """The file called `name` inside `folder`.

    Raises:
        DataError: if the name is not plain text or leads out of the folder (an index may come from a stranger).
    """
    if not isinstance(name, str) or not name or "\0" in name:
        raise DataError(f"{folder}: {name!r} is not a file name")
    path = folder / name
    root = folder.resolve()
    if not path.resolve().is_relative_to(root):
        raise DataError(f"{folder}: the file name {name!r} leads out of the folder; the index is wrong or forged")
    return path
