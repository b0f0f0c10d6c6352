"""`index.json`: what a checkpoint holds, written last, so that its presence means the checkpoint is whole.

    {"format": "resilin-checkpoint", "version": 1, "checksum": "crc32:...", "content": {
        "step": 100,
        "files": {"model.safetensors": {"bytes": ..., "header_checksum": "crc32:..."}},
        "tensors": {"model/embed.weight": {"file": "model.safetensors", "name": "embed.weight", "dtype": "F32",
                                           "shape": [512, 64], "checksum": "crc32:..."}},
        "tree": {"model": {"embed.weight": {"$tensor": "model/embed.weight"}}, "step": 100}}}

The checksum is of the content in the form written here, so that a changed digit in it is found too.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from resilin.checkpoint.errors import CheckpointError, DamagedError
from resilin.checkpoint.tensor_record import DTYPES, FileRecord, TensorRecord, checksum_text
from resilin.checkpoint.tree import Json

INDEX_NAME = "index.json"
_FORMAT = "resilin-checkpoint"
_VERSION = 1


@dataclass(frozen=True)
class Index:
    """The index of one checkpoint.

    Attributes:
        step: steps committed.
        files: every tensor file by its name.
        tensors: every tensor by its name in the tree.
        tree: the tree, with marks where the tensors were.
    """

    step: int
    files: Mapping[str, FileRecord]
    tensors: Mapping[str, TensorRecord]
    tree: Json

    @property
    def bytes(self) -> int:
        """Size of all tensor files."""
        return sum(file.bytes for file in self.files.values())


def _dump(content: Any) -> str:
    return json.dumps(content, separators=(",", ":"), allow_nan=False)


def index_text(index: Index) -> bytes:
    """The index as the file holds it; the same index always gives the same bytes."""
    content = {
        "step": index.step,
        "files": {name: asdict(record) for name, record in index.files.items()},
        "tensors": {name: asdict(record) for name, record in index.tensors.items()},
        "tree": index.tree,
    }
    body = _dump(content)
    head = {"format": _FORMAT, "version": _VERSION, "checksum": checksum_text(zlib.crc32(body.encode()))}
    return f'{_dump(head)[:-1]},"content":{body}}}\n'.encode()


def _file_name(name: str, path: Path) -> str:
    if name in ("", ".", "..") or any(letter in name for letter in "/\\\0"):
        raise DamagedError(f"{path}: names the file {name!r}, which is not a plain name inside the checkpoint's folder")
    return name


def read_index(folder: Path) -> Index:
    """The index of the checkpoint in `folder`.

    Raises:
        DamagedError: when it is missing, damaged, or names files outside the folder.
        CheckpointError: when it is of a newer version.
    """
    path = folder / INDEX_NAME
    try:
        raw = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise DamagedError(
            f"{folder}: has no {INDEX_NAME}: not a checkpoint, or one that was never completed"
        ) from None
    except OSError as error:
        raise DamagedError(f"{path}: cannot be read: {error.strerror}") from None
    try:
        whole = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise DamagedError(f"{path}: is not valid JSON ({error}); the file is damaged") from None
    if not isinstance(whole, dict) or whole.get("format") != _FORMAT:
        raise DamagedError(f"{path}: is not the index of a Resilin checkpoint (format {_FORMAT!r})")
    if whole.get("version") != _VERSION:
        raise CheckpointError(
            f"{path}: has version {whole.get('version')!r}, and this Resilin reads version {_VERSION}; "
            "it was written by a newer one: update Resilin to read it"
        )
    content = whole.get("content")
    if checksum_text(zlib.crc32(_dump(content).encode())) != whole.get("checksum"):
        raise DamagedError(f"{path}: its checksum is wrong; the file is damaged")
    if not isinstance(content, dict):
        raise DamagedError(f"{path}: has no content")
    try:
        files = {_file_name(name, path): FileRecord(**entry) for name, entry in content["files"].items()}
        tensors = {
            name: TensorRecord(**{**entry, "shape": tuple(entry["shape"])})
            for name, entry in content["tensors"].items()
        }
        for name, record in tensors.items():
            if record.file not in files or record.dtype not in DTYPES:
                raise DamagedError(
                    f"{path}: tensor {name!r} is {record.dtype} in file {record.file!r}; "
                    "the one or the other is unknown here"
                )
        return Index(content["step"], files, tensors, content["tree"])
    except DamagedError:
        raise
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise DamagedError(f"{path}: lacks what an index must have ({error!r})") from None
