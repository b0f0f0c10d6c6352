"""Checkpoints on a local (or shared) disk: temporary names, fsync, and a rename as the commit."""

from __future__ import annotations

import contextlib
import mmap
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from resilin.checkpoint.atomic import new_file, rename, sync_folder, write_all, write_file
from resilin.checkpoint.lock import lock_folder, unlock_folder
from resilin.checkpoint.storage import Folder

_SAVING, _OLD, _REMOVING = ".saving-", ".old-", ".removing-"


class LocalReader:
    """A file of the disk.

    Its requests are of a size that is still in the processor's cache when its checksum is computed.
    """

    request = 1 << 20

    def __init__(self, path: Path) -> None:
        self._handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self.size = os.fstat(self._handle).st_size
        self._mapping: mmap.mmap | None = None

    def read_into(self, target: memoryview, start: int) -> None:
        """By as many reads as the system wants."""
        while len(target):
            count = os.preadv(self._handle, [target], start)
            if count == 0:
                raise EOFError
            target, start = target[count:], start + count

    def mapped(self) -> mmap.mmap | None:
        """Private: whoever writes into a mapped tensor changes a copy of the page, never the file."""
        if self._mapping is None and self.size:
            self._mapping = mmap.mmap(self._handle, 0, access=mmap.ACCESS_COPY)
        return self._mapping

    def close(self) -> None:
        """The mapping lives on as long as somebody uses it."""
        os.close(self._handle)


class LocalSink:
    """A file descriptor."""

    def __init__(self, handle: int) -> None:
        self._handle = handle

    def write(self, data: bytes | memoryview) -> None:
        """Every byte of it."""
        write_all(self._handle, data)

    def sync(self) -> None:
        """Fsync."""
        os.fsync(self._handle)


class LocalFolder:
    """A folder of the disk."""

    def __init__(self, path: Path) -> None:
        self.location = path

    def names(self) -> list[str]:
        """All of them."""
        try:
            return os.listdir(self.location)  # noqa: PTH208  # names only
        except (FileNotFoundError, NotADirectoryError):
            return []

    def size(self, name: str) -> int:
        """From the folder's entry."""
        return (self.location / name).stat().st_size

    def read(self, name: str) -> bytes:
        """The whole file."""
        return (self.location / name).read_bytes()

    def open(self, name: str) -> LocalReader:
        """A descriptor of it."""
        return LocalReader(self.location / name)

    @contextlib.contextmanager
    def create(self, name: str) -> Iterator[LocalSink]:
        """Must not exist; fsync at the end."""
        with new_file(self.location / name) as handle:
            yield LocalSink(handle)

    def write(self, name: str, data: bytes) -> None:
        """By a temporary name and a rename, where it exists already."""
        if (self.location / name).exists():
            write_file(self.location / name, data)
            return
        with self.create(name) as sink:
            sink.write(data)

    def link(self, source: Folder, name: str) -> bool:
        """A hard link."""
        if not isinstance(source, LocalFolder):
            return False
        try:
            os.link(source.location / name, self.location / name)
        except OSError:  # gone meanwhile, or a file system without links
            return False
        return True

    def remove(self, name: str) -> None:
        """Unlink."""
        (self.location / name).unlink(missing_ok=True)

    def modified(self, name: str) -> float:
        """The file's own time."""
        return (self.location / name).stat().st_mtime

    def finish(self) -> None:
        """Fsync of the folder."""
        sync_folder(self.location)


class LocalRoot:
    """A folder of folders. Those under their own name are whole; leftovers begin with a dot."""

    def __init__(self, path: Path) -> None:
        self.location = path

    def names(self) -> list[str]:
        """Also those whose replacement was killed between its two renames."""
        try:
            found = os.listdir(self.location)  # noqa: PTH208  # names only, and many of them
        except (FileNotFoundError, NotADirectoryError):
            return []
        whole = {name.removeprefix(_OLD) for name in found}
        return [name for name in whole if not name.startswith(".")]

    def at(self, name: str) -> LocalFolder:
        """The earlier one, where its replacement was killed between its two renames."""
        final, old = self.location / name, self.location / (_OLD + name)
        return LocalFolder(old if old.exists() and not final.exists() else final)

    def lock(self) -> None:
        """Makes the folder, too."""
        self.location.mkdir(parents=True, exist_ok=True)
        lock_folder(self.location)

    def unlock(self) -> None:
        """Let others save."""
        unlock_folder(self.location)

    def clean(self) -> None:
        """By name."""
        for path in self.location.glob(".*step-*"):
            if path.name.startswith((_SAVING, _REMOVING)):
                shutil.rmtree(path, ignore_errors=True)
            elif path.name.startswith(_OLD):
                final = self.location / path.name.removeprefix(_OLD)
                if final.exists():
                    shutil.rmtree(path, ignore_errors=True)
                else:
                    rename(path, final)

    def begin(self, name: str) -> str:
        """An empty folder under a temporary name."""
        (self.location / (_SAVING + name)).mkdir()
        return ""

    def draft(self, name: str) -> LocalFolder:
        """That folder."""
        return LocalFolder(self.location / (_SAVING + name))

    def commit(self, name: str) -> None:
        """One rename; two where a checkpoint of the name is replaced."""
        temporary, final, old = (self.location / (mark + name) for mark in (_SAVING, "", _OLD))
        if not final.exists():
            rename(temporary, final)
            return
        rename(final, old)
        try:
            rename(temporary, final)
        except BaseException:
            if not final.exists():
                with contextlib.suppress(OSError):
                    rename(old, final)
            raise
        shutil.rmtree(old, ignore_errors=True)

    def abort(self, name: str) -> None:
        """Remove the temporary folder."""
        shutil.rmtree(self.location / (_SAVING + name), ignore_errors=True)

    def remove(self, name: str) -> None:
        """Renamed first, so that a removal cut short leaves no folder that looks like a checkpoint."""
        path, doomed = self.at(name).location, self.location / (_REMOVING + name)
        os.rename(path, doomed)  # noqa: PTH104
        shutil.rmtree(doomed)

    def free(self) -> int | None:
        """Of the disk."""
        return shutil.disk_usage(self.location).free
