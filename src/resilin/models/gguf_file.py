"""The GGUF container: named metadata values and the places of tensors in a memory-mapped file.

Read here rather than with the `gguf` package, whose reader makes a NumPy object of every token of the vocabulary and
takes seconds for what takes a tenth of one.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from resilin.models.weight_files import ModelFolderError

_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_STRING, _ARRAY = 8, 9


@dataclass(frozen=True, slots=True)
class TensorPlace:
    """Where a tensor's bytes begin and what they are.

    Attributes:
        name: in llama.cpp's naming.
        shape: rows first, as torch has it.
        kind: the number of its GGML type.
        start: first byte in the file.
    """

    name: str
    shape: tuple[int, ...]
    kind: int
    start: int


@dataclass(frozen=True, slots=True)
class GGUFFile:
    """An open GGUF file.

    Attributes:
        path: of the file.
        metadata: values by key.
        tensors: places by name.
        data: the whole file, mapped.
    """

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, TensorPlace]
    data: mmap.mmap


class _Cursor:
    """Reads values one after another; running past the end is a short file."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path, self.data, self.at = path, data, 0

    def take(self, count: int) -> bytes:
        end = self.at + count
        if count < 0 or end > len(self.data):
            raise ModelFolderError(
                f"{self.path}: ends at byte {len(self.data)} inside its header: the file is cut short"
            )
        piece = self.data[self.at : end]
        self.at = end
        return piece

    def scalar(self, form: str) -> Any:
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def text(self) -> str:
        return self.take(self.scalar("<Q")).decode("utf-8", errors="replace")

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.text()
        if kind == _ARRAY:
            inner, count = self.scalar("<I"), self.scalar("<Q")
            if inner in _SCALARS:
                form = _SCALARS[inner]
                return [item for (item,) in struct.iter_unpack(form, self.take(struct.calcsize(form) * count))]
            return [self.value(inner) for _ in range(count)]
        if kind not in _SCALARS:
            raise ModelFolderError(f"{self.path}: byte {self.at}: value of unknown type {kind}")
        return self.scalar(_SCALARS[kind])


def _align(at: int, step: int) -> int:
    return -(-at // step) * step


def _read(cursor: _Cursor, unknown_version: Callable[[int], str]) -> GGUFFile:
    version = cursor.scalar("<I")
    if version not in (2, 3):
        raise ModelFolderError(unknown_version(version))
    tensor_count, value_count = cursor.scalar("<Q"), cursor.scalar("<Q")
    metadata: dict[str, Any] = {}
    for _ in range(value_count):
        key = cursor.text()
        metadata[key] = cursor.value(cursor.scalar("<I"))
    places = []
    for _ in range(tensor_count):
        name, dimensions = cursor.text(), cursor.scalar("<I")
        shape = tuple(cursor.scalar("<Q") for _ in range(dimensions))
        places.append(TensorPlace(name, shape[::-1], cursor.scalar("<I"), cursor.scalar("<Q")))
    step = int(metadata.get("general.alignment", 32))
    start = _align(cursor.at, step)
    tensors = {p.name: TensorPlace(p.name, p.shape, p.kind, start + p.start) for p in places}
    return GGUFFile(cursor.path, metadata, tensors, cursor.data)


def open_gguf(path: Path | str) -> GGUFFile:
    """Read the metadata of a GGUF file (versions 2 and 3) and map its tensors.

    Raises:
        ModelFolderError: missing, not GGUF, another version, or cut short.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            if file.read(4) != b"GGUF":
                raise ModelFolderError(f"{path}: not a GGUF file (it does not begin with 'GGUF')")
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except FileNotFoundError:
        raise ModelFolderError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise ModelFolderError(f"{path}: is a folder; a .gguf file was expected") from None
    cursor = _Cursor(path, data)
    cursor.at = 4
    return _read(cursor, lambda version: f"{path}: GGUF version {version}; versions 2 and 3 can be read")
