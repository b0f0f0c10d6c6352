"""torch.distributed.checkpoint folders: `.metadata` (a pickle) says which box of which tensor lies where in which file.

Each box is a small torch file inside a larger one. Its own index is read as data, and its elements are mapped where
they lie. What is which is told by the keys of the saved tree: a dict with "state" and "param_groups" is the
optimizer's, "model" (or "module", "state_dict", or a tree of nothing but tensors) the model's, and the rest is kept.
"""

from __future__ import annotations

import io
import math
import mmap
import os
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from resilin.checkpoint.errors import CheckpointError, DamagedError
from resilin.checkpoint.foreign.buffers import Gathered, as_tensor
from resilin.checkpoint.foreign.pickles import buffer_of, inside, load_metadata, load_stream, plain
from resilin.checkpoint.foreign.shards import LayoutBuilder, Piece, Slice
from resilin.checkpoint.foreign.stored import FILES, OTHER, Stored, moment, weight
from resilin.checkpoint.tensor_record import DTYPE_NAMES
from resilin.checkpoint.tree import escape
from resilin.layout import Place, Region, file

METADATA = ".metadata"
MODEL_KEYS = ("model", "module", "state_dict")
_STEP_KEYS = ("step", "global_step", "iteration")


def is_dcp(folder: Path) -> bool:
    """Whether a folder is a checkpoint of torch.distributed.checkpoint."""
    return (folder / METADATA).is_file()


class _Files:
    """The mapped `.distcp` files of a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._maps: dict[str, mmap.mmap] = {}

    def item(self, name: str, offset: int, length: int, what: str) -> memoryview:
        """The bytes of one stored item."""
        if name not in self._maps:
            path = inside(self.folder, name, self.folder / METADATA)
            try:
                with path.open("rb") as handle:
                    self._maps[name] = mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_COPY)
            except FileNotFoundError:
                raise DamagedError(f"{path}: the file is missing; it holds {what}") from None
            except (OSError, ValueError) as error:
                raise DamagedError(f"{path}: cannot be opened ({error}); it should hold {what}") from None
        size = len(self._maps[name])
        if not 0 <= offset <= offset + length <= size:
            raise DamagedError(
                f"{self.folder / name}: has {size} bytes, but {what} should be at {offset} to {offset + length}; "
                "the file was cut"
            )
        return memoryview(self._maps[name])[offset : offset + length]


class _Window(io.RawIOBase):
    """Bytes as a file, without copying them."""

    def __init__(self, item: memoryview) -> None:
        super().__init__()
        self._item = item
        self._at = 0

    def readable(self) -> bool:
        """It is."""
        return True

    def seekable(self) -> bool:
        """It is."""
        return True

    def readinto(self, target: Any) -> int:
        """Copy the next bytes."""
        piece = self._item[self._at : self._at + len(target)]
        target[: len(piece)] = piece
        self._at += len(piece)
        return len(piece)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Go to a byte."""
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: len(self._item)}[whence]
        self._at = min(max(base + offset, 0), len(self._item))
        return self._at

    def tell(self) -> int:
        """The byte it is at."""
        return self._at


def _boxed_tensor(item: memoryview, where: str) -> Tensor:
    """A tensor that `torch.save` wrote into a larger file, as a view of the mapped bytes."""
    stream = _Window(item)
    meta = load_stream(stream, where, "meta")
    if not isinstance(meta, Tensor):
        raise DamagedError(f"{where}: holds a {type(meta).__name__}, not a tensor")
    try:
        with zipfile.ZipFile(stream) as archive:
            record = next(info for info in archive.infolist() if info.filename.endswith("/data/0"))
        if record.compress_type != zipfile.ZIP_STORED:
            raise DamagedError(f"{where}: is compressed, which torch does not do")
        name_length, extra_length = struct.unpack_from("<HH", item, record.header_offset + 26)
    except (zipfile.BadZipFile, StopIteration, struct.error) as error:
        raise DamagedError(f"{where}: is cut short or damaged ({error})") from None
    begin = record.header_offset + 30 + name_length + extra_length
    needed = meta.untyped_storage().nbytes()
    if record.file_size < needed or begin + needed > len(item):
        raise DamagedError(f"{where}: has {record.file_size} bytes for a tensor of {needed}")
    if needed == 0:
        return torch.empty(meta.shape, dtype=meta.dtype)
    row = torch.frombuffer(item[begin : begin + needed], dtype=torch.uint8).view(meta.dtype)
    return row.as_strided(meta.shape, meta.stride(), meta.storage_offset())


def read_dcp(folder: Path) -> Stored:
    """Open a distributed checkpoint.

    Raises:
        CheckpointError: a file is missing or cut, a box is missing or there twice, or a value has no place elsewhere.
    """
    metadata = load_metadata(folder / METADATA)
    files = _Files(folder)
    stored = {_index(key): info for key, info in (metadata.storage_data or {}).items()}
    paths = {name: tuple(path) for name, path in (metadata.planner_data or {}).items()}
    for name in metadata.state_dict_metadata:
        paths.setdefault(name, (name,))
    kinds = _kinds(paths, metadata.state_dict_metadata)
    gathered = _Boxes(files)
    values: dict[tuple[str | int, ...], Any] = {}
    for name, entry in metadata.state_dict_metadata.items():
        if type(entry).foreign.endswith("BytesStorageMetadata"):
            info = _found(stored, (name, None), folder)
            item = files.item(info.relative_path, info.offset, info.length, f"{name!r}")
            values[paths[name]] = load_stream(_Window(item), f"{folder / info.relative_path}: {name}")
            continue
        chunks = []
        for chunk in entry.chunks:
            info = _found(stored, (name, tuple(chunk.offsets)), folder)
            if vars(info).get("transform_descriptors"):
                raise CheckpointError(f"{folder / info.relative_path}: {name!r} is transformed, which is not read")
            chunks.append((tuple(chunk.offsets), tuple(chunk.sizes), info))
        tensor_name = _tensor_name(paths[name], kinds, entry.properties.state[0])
        gathered.add(tensor_name, name, tuple(entry.size), entry.properties.state[0], chunks)
    return _stored(folder, gathered, paths, values, kinds, metadata)


class _Boxes(Gathered):
    """Boxes in files: opened when they are read."""

    def __init__(self, files: _Files) -> None:
        super().__init__()
        self.files = files
        self.builder = LayoutBuilder()
        self._items: dict[tuple[Place, str], tuple[int, int, str]] = {}
        self.tensors: dict[str, str] = {}

    def add(self, tensor: str, name: str, shape: tuple[int, ...], dtype: torch.dtype, chunks: list[Any]) -> None:
        """A tensor in boxes: (offsets, sizes, where it is)."""
        if dtype not in DTYPE_NAMES:
            raise CheckpointError(f"{self.files.folder}: {name!r} has dtype {dtype}, which safetensors has no name for")
        if tensor in self.tensors:
            raise CheckpointError(
                f"{self.files.folder}: both {self.tensors[tensor]!r} and {name!r} would be called {tensor!r}"
            )
        self.tensors[tensor] = name
        self.builder.tensor(tensor, shape, DTYPE_NAMES[dtype])
        for offsets, sizes, info in chunks:
            place, buffer = file(info.relative_path), f"{name} at byte {info.offset}"
            self.files.item(info.relative_path, info.offset, info.length, f"{name!r} {list(offsets)}")
            self._items[place, buffer] = info.offset, info.length, name
            if math.prod(sizes):
                piece = Piece(Region.whole(sizes), offsets)
                # The strides of the box are known when it is opened; `read` gives its elements in row-major order.
                self.builder.shard(tensor, place, buffer, Slice(sizes, (piece,)), 0)

    def read(self, place: Place, buffer: str) -> Tensor:
        """A box as a row of its elements."""
        if (place, buffer) not in self._items:
            return super().read(place, buffer)
        offset, length, name = self._items[place, buffer]
        item = self.files.item(place.name, offset, length, repr(name))
        tensor = _boxed_tensor(item, f"{self.files.folder / place.name}: {name}")
        return buffer_of(tensor) if tensor.is_contiguous() and tensor.storage_offset() == 0 else tensor.reshape(-1)


def _index(key: Any) -> tuple[str, tuple[int, ...] | None]:
    offset = vars(key).get("offset")
    return key.fqn, None if offset is None else tuple(offset)


def _found(stored: Mapping[Any, Any], key: tuple[str, tuple[int, ...] | None], folder: Path) -> Any:
    if key not in stored:
        where = "" if key[1] is None else f" at {list(key[1])}"
        raise DamagedError(f"{folder / METADATA}: does not say where {key[0]!r}{where} is stored")
    return stored[key]


def _kinds(paths: Mapping[str, tuple[str | int, ...]], entries: Mapping[str, Any]) -> dict[str, str]:
    """Which top-level keys hold the model and the optimizer; "" is the key of a tree that is nothing but a model."""
    keys: dict[str, set[str]] = {}
    for path in paths.values():
        keys.setdefault(str(path[0]), set()).add(str(path[1]) if len(path) > 1 else "")
    kinds = {key: "optimizer" for key, inner in keys.items() if {"state", "param_groups"} & inner}
    models = [key for key in MODEL_KEYS if key in keys and keys[key] != {""}]
    if models:
        kinds[models[0]] = "model"
    elif not kinds and all(not type(entry).foreign.endswith("BytesStorageMetadata") for entry in entries.values()):
        kinds[""] = "model"
    return kinds


def _tensor_name(path: tuple[str | int, ...], kinds: Mapping[str, str], dtype: torch.dtype) -> str:
    if "" in kinds:
        return weight(".".join(map(str, path)))
    kind = kinds.get(str(path[0]))
    if kind == "model":
        return weight(".".join(map(str, path[1:])))
    if kind == "optimizer" and len(path) > 3 and path[1] == "state":
        return moment(str(path[-1]), ".".join(map(str, path[2:-1])))
    if path[0] == "files" and len(path) == 2 and dtype == torch.uint8:
        return FILES + str(path[1])
    return OTHER + "/".join(escape(str(key)) for key in path)


def _stored(
    folder: Path,
    gathered: _Boxes,
    paths: Mapping[str, tuple[str | int, ...]],
    values: Mapping[tuple[str | int, ...], Any],
    kinds: Mapping[str, str],
    metadata: Any,
) -> Stored:
    other: dict[str, Any] = {}
    for name in gathered.tensors:
        if name.startswith(OTHER):
            path = paths[gathered.tensors[name]]
            _put(other, path, {"$tensor": name})
    for path, value in values.items():
        where = "/".join(map(str, path))
        kind = kinds.get(str(path[0]))
        if kind == "optimizer" and len(path) > 3 and path[1] == "state" and isinstance(value, (int, float)):
            name = moment(str(path[-1]), ".".join(map(str, path[2:-1])))
            gathered.whole(name, METADATA, name, as_tensor(value))
        else:
            _put(other, path, gathered.marked(plain(value, where), METADATA, tuple(map(str, path))))
    other = {str(key): _lists(value) for key, value in other.items()}
    groups = _groups(other, kinds)
    steps = [other[key] for key in _STEP_KEYS if isinstance(other.get(key), int)]
    if isinstance(other.get("step"), int):
        del other["step"]
    chunks = len({info.relative_path for info in (metadata.storage_data or {}).values()})
    title = f"torch distributed checkpoint ({chunks} file{'s' if chunks != 1 else ''})"
    return Stored(title, gathered.builder.layout(folder), gathered.read, steps[0] if steps else None, groups, other)


def _groups(other: dict[str, Any], kinds: Mapping[str, str]) -> list[dict[str, Any]]:
    """Take the optimizer's groups out of the other values."""
    found: list[dict[str, Any]] = []
    for key in [key for key, kind in kinds.items() if kind == "optimizer" and key in other]:
        for group in other[key].pop("param_groups", []):
            found.append({**{k: v for k, v in group.items() if k != "params"}, "parameters": group.get("params", [])})
        if not other[key]:
            del other[key]
    return found


def _put(tree: dict[Any, Any], path: tuple[str | int, ...], value: Any) -> None:
    node = tree
    for key in path[:-1]:
        node = node.setdefault(key, {})
    node[path[-1]] = value


def _lists(node: Any) -> Any:
    """What were lists (their keys are numbers, not text) as lists again."""
    if not isinstance(node, dict) or "$tensor" in node:
        return node
    made = {key: _lists(node[key]) for key in node}
    if made and sorted(map(str, made)) == sorted(map(str, range(len(made)))) and all(isinstance(k, int) for k in made):
        return [made[number] for number in range(len(made))]
    return {str(key): value for key, value in made.items()}
