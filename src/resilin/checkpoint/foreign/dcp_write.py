"""Writing a torch.distributed.checkpoint folder, tensor by tensor, that `dcp.load` opens on any number of ranks.

The tree is the usual one: `{"model": ..., "optim": {"state": ..., "param_groups": ...}, ...}` with the names of the
parameters, as `torch.distributed.checkpoint.state_dict.get_state_dict` makes it.
"""

from __future__ import annotations

import io
import os
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor
from torch.distributed.checkpoint._nested_dict import flatten_state_dict
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    STORAGE_TYPES,
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from resilin.checkpoint.foreign.dcp import METADATA
from resilin.checkpoint.foreign.stored import FILES, MODEL, OPTIMIZER, Stored
from resilin.checkpoint.tensor_record import DTYPES
from resilin.checkpoint.tree import put_together

_MOST_FILE_BYTES = 5_000_000_000


def write_dcp(stored: Stored, target: Path, most_file_bytes: int = _MOST_FILE_BYTES) -> int:
    """Write a distributed checkpoint; the index comes last.

    Returns:
        Bytes written.
    """
    names: dict[int, str] = {}
    keep: list[Tensor] = []

    def named(name: str) -> Tensor:
        held = stored.holdings(name)
        empty = torch.empty(held.shape, dtype=DTYPES[held.dtype], device="meta")
        names[id(empty)] = name
        keep.append(empty)
        return empty

    tree = _tree(stored, named)
    flat, paths = flatten_state_dict(tree)
    for path, value in _empty(tree):  # torch leaves them out
        key = ".".join(map(str, path))
        flat[key], paths[key] = value, path
    entries: dict[str, STORAGE_TYPES] = {}
    places: dict[MetadataIndex, _StorageInfo] = {}
    number, written = 0, 0
    handle: IO[bytes] = (target / f"__{number}_0.distcp").open("xb")
    try:
        for key, value in flat.items():
            if handle.tell() >= most_file_bytes:
                _finish(handle)
                number += 1
                handle = (target / f"__{number}_0.distcp").open("xb")
            begin = handle.tell()
            if isinstance(value, Tensor):
                tensor = stored.tensor(names[id(value)])
                index = MetadataIndex(key, [0] * tensor.dim())
                entries[key] = TensorStorageMetadata(
                    TensorProperties.create_from_tensor(tensor),
                    tensor.size(),
                    [ChunkStorageMetadata(torch.Size([0] * tensor.dim()), tensor.size())],
                )
                _save_tensor(tensor, handle)
            else:
                index = MetadataIndex(key)
                entries[key] = BytesStorageMetadata()
                stream = io.BytesIO()
                torch.save(value, stream)
                handle.write(stream.getbuffer())
            length = handle.tell() - begin
            places[index] = _StorageInfo(f"__{number}_0.distcp", begin, length)
            written += length
    finally:
        _finish(handle)
    raw = pickle.dumps(Metadata(entries, paths, places))
    with (target / METADATA).open("xb") as handle:
        handle.write(raw)
        handle.flush()
        os.fsync(handle.fileno())
    return written + len(raw)


def _empty(node: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[tuple[str | int, ...], Any]]:
    if isinstance(node, (dict, list)):
        if not node and len(path) and path != ("model",):
            yield path, node
        for key, item in node.items() if isinstance(node, dict) else enumerate(node):
            yield from _empty(item, (*path, key))


def _save_tensor(tensor: Tensor, handle: IO[bytes]) -> None:
    # A view of a mapped file would be saved with all of that file.
    whole = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    torch.save(tensor if whole else tensor.clone(memory_format=torch.contiguous_format), handle)


def _finish(handle: IO[bytes]) -> None:
    if not handle.closed:
        handle.flush()
        os.fsync(handle.fileno())
        handle.close()


def _tree(stored: Stored, named: Callable[[str], Tensor]) -> dict[str, Any]:
    model = {name.removeprefix(MODEL): named(name) for name in stored.under(MODEL)}
    model.update({alias.removeprefix(MODEL): named(name) for alias, name in stored.tied(MODEL).items()})
    tree: dict[str, Any] = {"model": model}
    states: dict[str, dict[str, Tensor]] = {}
    for name in stored.under(OPTIMIZER):
        state, _, parameter = name.removeprefix(OPTIMIZER).partition("/")
        states.setdefault(parameter, {})[state] = named(name)
    if states or stored.groups:
        groups = [
            {**{key: value for key, value in group.items() if key != "parameters"}, "params": group["parameters"]}
            for group in stored.groups
        ]
        tree["optim"] = {"state": states, "param_groups": groups}
    files = {name.removeprefix(FILES): named(name) for name in stored.under(FILES)}
    if files:
        tree["files"] = files
    tree.update(put_together(stored.other, named))
    if stored.step is not None:
        tree.setdefault("step", stored.step)
    return tree
