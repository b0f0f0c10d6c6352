"""Where checkpoints are kept: a few operations that a disk and an object store both have.

A `Root` is the place of a run's checkpoints, a `Folder` one of them. Local disks (`local_storage.py`) give a whole
folder its name in one step; object stores (`object_storage.py`) have no such step, and there the index, written
last, is what makes a checkpoint exist.
"""

from __future__ import annotations

import mmap
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

Location = Path | str
"""A local path, or the URL of an object store that fsspec knows ("s3://bucket/run", "memory://test")."""


def join(location: Location, name: str) -> Location:
    """The location of something inside a folder."""
    return location / name if isinstance(location, Path) else f"{location.rstrip('/')}/{name}"


class Reader(Protocol):
    """A file opened for reading."""

    @property
    def size(self) -> int:
        """Its bytes."""

    @property
    def request(self) -> int:
        """How many bytes to ask for at once."""

    def read_into(self, target: memoryview, start: int) -> None:
        """Fill all of `target` with the bytes from `start` on.

        Raises:
            OSError: it cannot be read.
            EOFError: it ends before.
        """

    def mapped(self) -> mmap.mmap | None:
        """Its pages in memory, private to whoever writes into them; None where that is not possible."""

    def close(self) -> None:
        """Let it go."""


class Sink(Protocol):
    """A file being written."""

    def write(self, data: bytes | memoryview) -> None:
        """Append all of it."""

    def sync(self) -> None:
        """Bring what was written so far to disk, if that is something to be done; may be called from a thread."""


class Folder(Protocol):
    """The files of one checkpoint."""

    @property
    def location(self) -> Location:
        """Where it is."""

    def names(self) -> list[str]:
        """Its files, in any order; none where it does not exist."""

    def size(self, name: str) -> int:
        """Bytes of a file.

        Raises:
            OSError: there is none, or it cannot be looked at.
        """

    def read(self, name: str) -> bytes:
        """All of a small file.

        Raises:
            OSError: there is none, or it cannot be read.
        """

    def open(self, name: str) -> Reader:
        """A file for reading.

        Raises:
            OSError: there is none, or it cannot be opened.
        """

    def create(self, name: str) -> AbstractContextManager[Sink]:
        """A new file; safe on disk when the block ends without an error.

        Raises:
            OSError: whatever the system says.
        """

    def write(self, name: str, data: bytes) -> None:
        """A whole small file: there completely or not at all, on disk when this returns. It may replace another."""

    def link(self, source: Folder, name: str) -> bool:
        """Give a file of another folder a second name here; False where that is not possible."""

    def remove(self, name: str) -> None:
        """Remove a file, if there is one."""

    def modified(self, name: str) -> float:
        """When a file was written, seconds since 1970; NaN where nobody knows."""

    def finish(self) -> None:
        """Bring the list of names to disk."""


class Root(Protocol):
    """A place that holds checkpoints by name."""

    @property
    def location(self) -> Location:
        """Where it is."""

    def names(self) -> list[str]:
        """The checkpoints that were committed, damaged ones too."""

    def at(self, name: str) -> Folder:
        """One of them, whether or not it exists."""

    def lock(self) -> None:
        """Keep other processes from saving here, as far as the storage can.

        Raises:
            CheckpointError: another does.
            OSError: it cannot be written here at all.
        """

    def unlock(self) -> None:
        """Undo `lock`."""

    def clean(self) -> None:
        """Remove what interrupted saves and removals have left; finish a commit that was half done."""

    def begin(self, name: str) -> str:
        """Make ready to write a checkpoint, which may replace one of the same name.

        Returns:
            A suffix for the names of its files, so that none of those to be replaced is overwritten; mostly empty.
        """

    def draft(self, name: str) -> Folder:
        """Where its files go until it is committed; any process may ask once another has begun."""

    def commit(self, name: str) -> None:
        """Make the draft the checkpoint of this name, safely."""

    def abort(self, name: str) -> None:
        """Forget the draft; never raises."""

    def remove(self, name: str) -> None:
        """Remove a checkpoint; cut short, what is left is none.

        Raises:
            OSError: it could not.
        """

    def free(self) -> int | None:
        """Bytes that can still be written, or None where nobody knows."""


def root_at(location: Location) -> Root:
    """The storage of checkpoints at a path or URL."""
    from resilin.checkpoint.local_storage import LocalRoot

    local = _local_path(location)
    if local is not None:
        return LocalRoot(local)
    from resilin.checkpoint.object_storage import ObjectRoot

    return ObjectRoot(str(location))


def folder_at(location: Location) -> Folder:
    """One checkpoint's files at a path or URL."""
    from resilin.checkpoint.local_storage import LocalFolder

    local = _local_path(location)
    if local is not None:
        return LocalFolder(local)
    from resilin.checkpoint.object_storage import ObjectFolder

    return ObjectFolder(str(location))


def _local_path(location: Location) -> Path | None:
    if isinstance(location, Path):
        return location
    scheme, separator, rest = location.partition("://")
    if not separator:
        return Path(location)
    return Path(rest) if scheme in ("file", "local") else None


def as_location(text: Location) -> Location:
    """A path where it is one of this machine, the URL otherwise."""
    local = _local_path(text)
    return text if local is None else local
