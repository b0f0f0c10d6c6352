"""Checkpoints in an object store, or on anything else that fsspec opens.

There is no rename and no folder. An object is there completely or not at all, and so the index is the commit: a
checkpoint exists from the moment its `index.json` does, which is written last and removed first. Where a checkpoint
replaces one of the same step, its files get other names, the new index takes the place of the old one in one step,
and the old files go afterwards.
"""

from __future__ import annotations

import contextlib
import errno
import json
import mmap
import re
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from resilin.checkpoint.storage import Folder

T = TypeVar("T")
_INDEX, _COPY = "index.json", "index.copy.json"
_SUFFIX = re.compile(r"~r(\d+)\.safetensors")


def _file_system(url: str) -> tuple[Any, str]:
    from fsspec.core import url_to_fs

    try:
        system, path = url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise OSError(errno.EPROTONOSUPPORT, f"{url}: {error}") from None
    return system, str(path).rstrip("/")


def _asked(what: Callable[[], T]) -> T:
    """The answer; what stores raise besides OSError becomes one, so that callers need to know one kind."""
    try:
        return what()
    except OSError:
        raise
    except Exception as error:
        raise OSError(errno.EIO, f"{type(error).__name__}: {error}") from error


class ObjectReader:
    """An object, read by ranges."""

    request = 32 << 20

    def __init__(self, system: Any, path: str) -> None:
        self._system, self._path = system, path
        self.size = int(_asked(lambda: system.size(path)))

    def read_into(self, target: memoryview, start: int) -> None:
        """A request for each 32 MiB."""
        for begin in range(0, len(target), self.request):
            piece = target[begin : begin + self.request]
            first = start + begin
            data = _asked(lambda: self._system.cat_file(self._path, start=first, end=first + len(piece)))  # noqa: B023
            if len(data) != len(piece):
                raise EOFError
            piece[:] = data

    def mapped(self) -> mmap.mmap | None:
        """Objects are not mapped."""
        return None

    def close(self) -> None:
        """Nothing is open."""


class ObjectSink:
    """An upload."""

    def __init__(self, file: Any) -> None:
        self._file = file

    def write(self, data: bytes | memoryview) -> None:
        """Buffered and sent in parts."""
        _asked(lambda: self._file.write(data))

    def sync(self) -> None:
        """The store answers for an object when it is complete, not before."""


class ObjectFolder:
    """The objects under a prefix."""

    def __init__(self, url: str) -> None:
        self.location = url.rstrip("/")
        self._system, self._path = _file_system(url)

    def _at(self, name: str) -> str:
        return f"{self._path}/{name}"

    def names(self) -> list[str]:
        """As the store lists them now."""
        self._system.invalidate_cache(self._path)
        try:
            found = _asked(lambda: self._system.ls(self._path, detail=False))
        except FileNotFoundError:
            return []
        return [str(path).rstrip("/").rsplit("/", 1)[-1] for path in found]

    def size(self, name: str) -> int:
        """As the store says."""
        self._system.invalidate_cache(self._path)
        return int(_asked(lambda: self._system.size(self._at(name))))

    def read(self, name: str) -> bytes:
        """The whole object."""
        return bytes(_asked(lambda: self._system.cat_file(self._at(name))))

    def open(self, name: str) -> ObjectReader:
        """Asks for its size."""
        return ObjectReader(self._system, self._at(name))

    @contextlib.contextmanager
    def create(self, name: str) -> Iterator[ObjectSink]:
        """An upload that is complete when the block ends; one that failed is dropped, or left without an index."""
        file = self._placed(lambda: self._system.open(self._at(name), "wb"))
        try:
            yield ObjectSink(file)
        except BaseException:
            with contextlib.suppress(Exception):
                getattr(file, "discard", file.close)()
            raise
        _asked(file.close)

    def write(self, name: str, data: bytes) -> None:
        """One request: there completely or not at all."""
        self._placed(lambda: self._system.pipe_file(self._at(name), data))

    def _placed(self, write: Callable[[], T]) -> T:
        """What `write` gives; where the store has folders after all (SFTP, HDFS), they are made."""
        try:
            return _asked(write)
        except FileNotFoundError:
            _asked(lambda: self._system.makedirs(self._path, exist_ok=True))
            return _asked(write)

    def vanish(self) -> None:
        """Remove the empty folder, where the store has folders."""
        with contextlib.suppress(Exception):
            self._system.rmdir(self._path)

    def link(self, source: Folder, name: str) -> bool:
        """Objects have one name."""
        return False

    def remove(self, name: str) -> None:
        """If it is there."""
        with contextlib.suppress(FileNotFoundError):
            _asked(lambda: self._system.rm_file(self._at(name)))

    def modified(self, name: str) -> float:
        """Where the store tells."""
        try:
            return float(_asked(lambda: self._system.modified(self._at(name))).timestamp())
        except (OSError, NotImplementedError):
            return float("nan")

    def finish(self) -> None:
        """Nothing is left to do."""


class ObjectRoot:
    """A prefix with a checkpoint under each name. There is no lock: one run, one prefix."""

    def __init__(self, url: str) -> None:
        self.location = url.rstrip("/")
        self._root = ObjectFolder(url)

    def names(self) -> list[str]:
        """Those that have an index."""
        return [name for name in self._root.names() if _INDEX in self.at(name).names()]

    def at(self, name: str) -> ObjectFolder:
        """Everything under the name."""
        return ObjectFolder(f"{self.location}/{name}")

    def lock(self) -> None:
        """Nothing that could hold another process off."""

    def unlock(self) -> None:
        """Nothing."""

    def clean(self) -> None:
        """Remove the objects of steps that were never committed."""
        for name in self._root.names():
            folder = self.at(name)
            if re.fullmatch(r"step-\d{8,}", name) and _INDEX not in folder.names():
                for file in folder.names():
                    folder.remove(file)
                folder.vanish()

    def begin(self, name: str) -> str:
        """A number that no file there has, where there are some."""
        used = [int(match[1]) for file in self.at(name).names() if (match := _SUFFIX.search(file))]
        return f"~r{max(used, default=1) + 1}" if self.at(name).names() else ""

    def draft(self, name: str) -> ObjectFolder:
        """The final place: without the new index nothing there counts."""
        return self.at(name)

    def commit(self, name: str) -> None:
        """The index is there already; what it does not name can go."""
        self._drop_unlisted(name)

    def abort(self, name: str) -> None:
        """Remove what the index of the name, if there is one, does not list."""
        with contextlib.suppress(OSError):
            self._drop_unlisted(name)

    def _drop_unlisted(self, name: str) -> None:
        folder = self.at(name)
        kept = {_INDEX, _COPY}
        names = folder.names()
        if _INDEX in names:
            try:
                content = json.loads(folder.read(_INDEX))["content"]["files"]
                kept |= {entry["name"] for entry in content} if isinstance(content, list) else set(content)
                if _COPY in names and folder.read(_COPY) != folder.read(_INDEX):  # of a replacement that failed
                    folder.write(_COPY, folder.read(_INDEX))
            except (ValueError, KeyError, TypeError):
                return  # damaged: then nothing is known to be superfluous
        else:
            kept = set()
        for file in names:
            if file not in kept:
                folder.remove(file)

    def remove(self, name: str) -> None:
        """The index first: what is left then is no checkpoint."""
        folder = self.at(name)
        folder.remove(_INDEX)
        for file in folder.names():
            folder.remove(file)
        folder.vanish()

    def free(self) -> int | None:
        """Nobody knows."""
        return None
