"""`index.json`: what a checkpoint holds, written last, so that its presence means the checkpoint is whole.

    {"format": "resilin-checkpoint", "version": 2, "checksum": "crc32:...", "content": {
        "step": 100,
        "block": 1048576,
        "files": [{"name": "model.safetensors", "bytes": ..., "header_checksum": "crc32:..."}],
        "tensors": {"model/embed.weight": {"dtype": "F32", "shape": [512, 64],
                                           "pieces": [[0, "embed.weight", 320, [0, 0], [512, 64], [2838927401]]]}},
        "tree": {"model": {"embed.weight": {"$tensor": "model/embed.weight"}}, "step": 100}}}

A piece is `[file number, name in the file, first byte, offsets, sizes, CRC-32 of each block]`. The checksum is of the
content in the form written here, so that a changed digit in it is found too. docs/checkpoint-format.md says it all.
"""

from __future__ import annotations

import json
import warnings
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from resilin.checkpoint.errors import CheckpointError, DamagedError
from resilin.checkpoint.storage import Folder, join
from resilin.checkpoint.tensor_record import (
    BLOCK_BYTES,
    DTYPES,
    FileRecord,
    TensorRecord,
    checksum_text,
    data_bytes,
    shape_in_file,
    shape_in_torch,
)
from resilin.checkpoint.tree import Json
from resilin.layout import Boxes, Layout, LayoutError, check, file

INDEX_NAME = "index.json"
COPY_NAME = "index.copy.json"
_FORMAT = "resilin-checkpoint"
_VERSION = 2


@dataclass(frozen=True)
class Index:
    """The index of one checkpoint.

    Attributes:
        step: steps committed.
        files: every tensor file; tensors name them by their number here.
        tensors: every tensor by its name in the tree.
        tree: the tree, with marks where the tensors were.
    """

    step: int
    files: Sequence[FileRecord]
    tensors: Mapping[str, TensorRecord]
    tree: Json

    @property
    def bytes(self) -> int:
        """Size of all tensor files."""
        return sum(record.bytes for record in self.files)

    def layout(self) -> Layout:
        """Which file holds which region of which tensor; row n of a tensor is its piece n."""
        places = tuple(file(record.name) for record in self.files)
        return Layout(places, {name: record.holdings() for name, record in self.tensors.items()})


def _dump(content: Any) -> str:
    return json.dumps(content, separators=(",", ":"), allow_nan=False)


def _tensor_json(record: TensorRecord) -> dict[str, Any]:
    columns = zip(
        record.files.tolist(),
        record.names,
        record.begins.tolist(),
        record.boxes.offsets.tolist(),
        record.boxes.sizes.tolist(),
        record.checksums,
        strict=True,
    )
    pieces = [
        [number, name, begin, list(shape_in_file(record.dtype, o)), list(shape_in_file(record.dtype, s)), list(sums)]
        for number, name, begin, o, s, sums in columns
    ]
    return {"dtype": record.dtype, "shape": list(shape_in_file(record.dtype, record.shape)), "pieces": pieces}


def index_text(index: Index) -> bytes:
    """The index as the file holds it; the same index always gives the same bytes."""
    content = {
        "step": index.step,
        "block": BLOCK_BYTES,
        "files": [asdict(record) for record in index.files],
        "tensors": {name: _tensor_json(record) for name, record in index.tensors.items()},
        "tree": index.tree,
    }
    body = _dump(content)
    head = {"format": _FORMAT, "version": _VERSION, "checksum": checksum_text(zlib.crc32(body.encode()))}
    return f'{_dump(head)[:-1]},"content":{body}}}\n'.encode()


def read_index(folder: Folder, *, fall_back: bool = True) -> Index:
    """The index of the checkpoint in `folder`.

    Args:
        folder: of the checkpoint.
        fall_back: where the index is damaged and has a second copy, take that, with a warning.

    Raises:
        DamagedError: when it is missing, damaged, or names files outside the folder.
        CheckpointError: when it is of a newer version.
    """
    try:
        raw = folder.read(INDEX_NAME)
    except (FileNotFoundError, NotADirectoryError):
        raise DamagedError(
            f"{folder.location}: has no {INDEX_NAME}: not a checkpoint, or one that was never completed"
        ) from None
    except OSError as error:
        raise DamagedError(f"{join(folder.location, INDEX_NAME)}: cannot be read: {error.strerror or error}") from None
    try:
        return parse_index(raw, str(join(folder.location, INDEX_NAME)))
    except CheckpointError as error:  # of another version too: one bit can make that
        if not fall_back or COPY_NAME not in folder.names():
            raise
        try:
            index = parse_index(folder.read(COPY_NAME), str(join(folder.location, COPY_NAME)))
        except (OSError, CheckpointError):
            raise error from None
        warnings.warn(f"{error}; its second copy, {COPY_NAME}, is good and was taken", stacklevel=2)
        return index


def parse_index(raw: bytes, path: str) -> Index:
    """The index that these bytes hold.

    Args:
        raw: the file's content.
        path: its name, for messages.

    Raises:
        DamagedError: when it is damaged, contradicts itself, or names files outside its folder.
        CheckpointError: when it is of a newer version.
    """
    try:
        whole = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise DamagedError(f"{path}: is not valid JSON ({error}); the file is damaged") from None
    if not isinstance(whole, dict) or whole.get("format") != _FORMAT:
        raise DamagedError(f"{path}: is not the index of a Resilin checkpoint (format {_FORMAT!r})")
    if whole.get("version") not in (1, _VERSION):
        raise CheckpointError(
            f"{path}: has version {whole.get('version')!r}, and this Resilin reads versions 1 to {_VERSION}; "
            "it was written by a newer one: update Resilin to read it"
        )
    content = whole.get("content")
    if checksum_text(zlib.crc32(_dump(content).encode())) != whole.get("checksum"):
        raise DamagedError(f"{path}: its checksum is wrong; the file is damaged")
    if not isinstance(content, dict):
        raise DamagedError(f"{path}: has no content")
    try:
        index = _version_1(content) if whole["version"] == 1 else _version_2(content)
    except (KeyError, TypeError, AttributeError, ValueError, IndexError, OverflowError) as error:
        raise DamagedError(f"{path}: lacks what an index must have ({error!r})") from None
    except LayoutError as error:
        raise DamagedError(f"{path}: {error}") from None
    for record in index.files:
        if record.name in ("", ".", "..") or any(letter in record.name for letter in "/\\\0"):
            raise DamagedError(
                f"{path}: names the file {record.name!r}, which is not a plain name inside the checkpoint's folder"
            )
    if len({record.name for record in index.files}) != len(index.files):
        raise DamagedError(f"{path}: names a file twice")
    _check_pieces(index, path)
    return index


def _check_pieces(index: Index, path: str) -> None:
    """Every element of every tensor is in one piece, and that in a file that is listed."""
    several = []
    for name, record in index.tensors.items():
        if len(record) and not 0 <= int(record.files.min()) <= int(record.files.max()) < len(index.files):
            raise DamagedError(f"{path}: tensor {name!r} lies in a file that is unknown here")
        if not record.is_whole and record.bytes:
            several.append(name)
    try:
        check(index.layout(), several)
    except LayoutError as error:
        raise DamagedError(f"{path}: {error}") from None


def _version_2(content: dict[str, Any]) -> Index:
    if content["block"] != BLOCK_BYTES:
        raise ValueError(f"checksums of blocks of {content['block']} bytes")
    files = [FileRecord(str(e["name"]), int(e["bytes"]), str(e["header_checksum"])) for e in content["files"]]
    tensors = {}
    for name, entry in content["tensors"].items():
        dtype = entry["dtype"]
        _known(name, dtype)
        shape, rows = shape_in_torch(dtype, entry["shape"]), entry["pieces"]
        dims = len(shape), len(rows)
        offsets = [shape_in_torch(dtype, row[3]) for row in rows]
        sizes = [shape_in_torch(dtype, row[4]) for row in rows]
        boxes = Boxes(
            np.array(offsets, np.int64).reshape(dims[1], dims[0]), np.array(sizes, np.int64).reshape(dims[1], dims[0])
        )
        numbers, begins = (np.array([row[column] for row in rows], np.int64) for column in (0, 2))
        if (boxes.offsets < 0).any() or (boxes.sizes < 0).any() or any(size < 0 for size in shape):
            raise ValueError(f"tensor {name!r} has a negative size")
        checksums = tuple(tuple(map(int, row[5])) for row in rows)
        for size, sums in zip(sizes, checksums, strict=True):
            if len(sums) != -(-data_bytes(dtype, size) // BLOCK_BYTES):
                raise ValueError(f"tensor {name!r} has {len(sums)} checksums for a piece of {list(size)}")
        record = TensorRecord(dtype, shape, numbers, tuple(str(row[1]) for row in rows), begins, boxes, checksums)
        record.holdings()  # refuses a region outside the tensor
        tensors[name] = record
    return Index(int(content["step"]), files, tensors, content["tree"])


def _version_1(content: dict[str, Any]) -> Index:
    """Every tensor one piece, with one checksum; the file's header says where it begins."""
    files = [FileRecord(name, int(e["bytes"]), str(e["header_checksum"])) for name, e in content["files"].items()]
    numbers = {record.name: number for number, record in enumerate(files)}
    tensors = {}
    for name, entry in content["tensors"].items():
        _known(name, entry["dtype"])
        shape = shape_in_torch(entry["dtype"], entry["shape"])
        sums = (int(entry["checksum"].removeprefix("crc32:"), 16),)
        alone = TensorRecord.alone(entry["dtype"], shape, numbers[entry["file"]], entry["name"], -1, sums)
        tensors[name] = TensorRecord(**{**vars(alone), "whole_checksums": True})
    return Index(int(content["step"]), files, tensors, content["tree"])


def _known(name: str, dtype: object) -> None:
    if dtype not in DTYPES:
        raise LayoutError(f"tensor {name!r} is {dtype}, which is unknown here")
