"""Reading one checkpoint folder: whole, in part, or only to check it."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from resilin.checkpoint.errors import CheckpointError, DamagedError
from resilin.checkpoint.index import INDEX_NAME, Index, read_index
from resilin.checkpoint.tensor_read import TensorFile
from resilin.checkpoint.tree import put_together
from resilin.nouns import State

_THREADS = 2  # reading and checksums overlap; more threads only wait for the same memory


def quick_check(folder: Path) -> Index:
    """The index of a checkpoint all of whose files are present with their sizes; no tensor is read.

    Raises:
        CheckpointError: naming what is missing or cut short.
    """
    index = read_index(folder)
    for name, record in index.files.items():
        try:
            size = (folder / name).stat().st_size
        except OSError as error:
            raise DamagedError(f"{folder / name}: the file is missing ({error.strerror})") from None
        if size != record.bytes:
            raise DamagedError(
                f"{folder / name}: has {size} bytes, but {record.bytes} were written; the file was cut or changed"
            )
    return index


def _select(index: Index, folder: Path, parts: Collection[str] | None) -> dict[str, Any]:
    if not isinstance(index.tree, dict):
        raise DamagedError(f"{folder / INDEX_NAME}: its tree is not a dict")
    if parts is None:
        return index.tree
    chosen = {}
    for part in parts:
        key = f"${part}" if part.startswith("$") else part
        if key not in index.tree:
            raise CheckpointError(f"{folder}: has no part {part!r}; it holds: {', '.join(index.tree) or 'nothing'}")
        chosen[key] = index.tree[key]
    return chosen


@contextmanager
def _opened(folder: Path, index: Index, names: Collection[str]) -> Iterator[dict[str, TensorFile]]:
    with ExitStack() as stack:
        files = {}
        for file in dict.fromkeys(index.tensors[name].file for name in names):
            files[file] = TensorFile(folder / file, index.files[file])
            stack.callback(files[file].close)
        yield files


def _read(
    folder: Path, index: Index, names: Collection[str], device: torch.device, mapped: bool, verify: bool
) -> dict[str, Tensor]:
    with _opened(folder, index, names) as files, ThreadPoolExecutor(_THREADS) as pool:

        def one(name: str) -> Tensor:
            record = index.tensors[name]
            return files[record.file].read(record, device, mapped=mapped, verify=verify)

        return dict(zip(names, pool.map(one, names), strict=True))


def load_checkpoint(
    folder: Path,
    device: torch.device | str = "cpu",
    *,
    parts: Collection[str] | None = None,
    mapped: bool = False,
    verify: bool = True,
) -> State:
    """The tree that was saved, bit for bit.

    Args:
        folder: of one step.
        device: where the tensors should be; they pass through the mapped file, one by one.
        parts: only these top-level keys; other files are not even opened. None: everything.
        mapped: on the CPU, give views of the file's pages instead of own memory: nothing is read before it is used,
            with `verify=False`. Writing into such a tensor does not change the file.
        verify: compare every checksum.

    Raises:
        CheckpointError: naming the file and the tensor that is missing, cut short, changed, or unknown here.
    """
    index = read_index(folder)
    tree = _select(index, folder, parts)
    names: dict[str, None] = {}

    def note(name: str) -> None:
        if name not in index.tensors:
            raise DamagedError(f"{folder / INDEX_NAME}: its tree names tensor {name!r}, which it does not list")
        names[name] = None

    put_together(tree, note)
    tensors = _read(folder, index, list(names), torch.device(device), mapped, verify)
    state: State = put_together(tree, tensors.__getitem__)
    return state


def verify_checkpoint(folder: Path) -> Index:
    """Read every byte of a checkpoint and compare every checksum.

    Returns:
        Its index.

    Raises:
        CheckpointError: for the first thing that is wrong, naming file and tensor.
    """
    index = quick_check(folder)
    cpu = torch.device("cpu")
    with _opened(folder, index, index.tensors) as files, ThreadPoolExecutor(_THREADS) as pool:

        def one(name: str) -> None:
            record = index.tensors[name]
            files[record.file].read(record, cpu, mapped=True, verify=True)

        for _ in pool.map(one, index.tensors):
            pass
        for name, file in files.items():
            unlisted = set(file.entries) - {r.name for r in index.tensors.values() if r.file == name}
            if unlisted:
                raise DamagedError(f"{folder / name}: holds tensor {min(unlisted)!r}, which the index does not list")
    return index
