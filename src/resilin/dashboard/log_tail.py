"""Follows a file that another process appends lines to: every whole line once, however long the file has become."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

_CHUNK = 1 << 22  # bytes


@dataclass(frozen=True, slots=True)
class Piece:
    """What was new.

    Attributes:
        raw: whole lines, each with its end.
        anew: whether the file is another one, or was cut, since the last piece: what was read before is no more.
    """

    raw: bytes
    anew: bool = False


class LogTail:
    """Reads a file from its beginning to its end, and then whatever is added.

    A line counts once its end is there: one that is being written, or that a kill cut short, is left for later.

    Args:
        path: the file, which need not be there yet.
        chunk: bytes that one piece has at most, unless a single line is longer.

    Attributes:
        offset: bytes of whole lines that were given.
        size: bytes of the file when it was looked at last.
    """

    def __init__(self, path: Path, chunk: int = _CHUNK) -> None:
        self._path, self._chunk = path, chunk
        self._file: tuple[int, int] | None = None
        self.offset = self.size = 0

    def read(self) -> Piece:
        """The next piece; empty where there is nothing new.

        Raises:
            OSError: the file is there, and cannot be read.
        """
        try:
            handle = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return Piece(b"", self._forget())
        try:
            status = os.fstat(handle)
            file, anew = (status.st_dev, status.st_ino), False
            if self._file != file or status.st_size < self.offset:
                anew = self._forget()
                self._file = file
            self.size = status.st_size
            raw = self._whole_lines(handle)
        finally:
            os.close(handle)
        self.offset += len(raw)
        return Piece(raw, anew)

    def _forget(self) -> bool:
        """Begin again; tells whether anything had been given."""
        known, self._file = self._file is not None and self.offset > 0, None
        self.offset = self.size = 0
        return known

    def _whole_lines(self, handle: int) -> bytes:
        length = self._chunk
        while True:
            raw = os.pread(handle, length, self.offset)
            end = raw.rfind(b"\n") + 1
            if end or len(raw) < length:
                return raw[:end]
            length *= 2
