"""Reading one checkpoint: whole, in part, or only to check it."""

from __future__ import annotations

from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from resilin.checkpoint.errors import DamagedError
from resilin.checkpoint.index import Index, read_index
from resilin.checkpoint.reader import CheckpointReader
from resilin.checkpoint.storage import Folder, Location, join
from resilin.checkpoint.tree import put_together
from resilin.nouns import State

THREADS = 2  # reading and checksums overlap; more threads only wait for the same memory


def quick_check(folder: Folder) -> Index:
    """The index of a checkpoint all of whose files are present with their sizes; no tensor is read.

    Raises:
        CheckpointError: naming what is missing or cut short.
    """
    index = read_index(folder)
    for record in index.files:
        path = join(folder.location, record.name)
        try:
            size = folder.size(record.name)
        except OSError as error:
            raise DamagedError(f"{path}: the file is missing ({error.strerror or error})") from None
        if size != record.bytes:
            raise DamagedError(
                f"{path}: has {size} bytes, but {record.bytes} were written; the file was cut or changed"
            )
    return index


def load_checkpoint(
    location: Location,
    device: torch.device | str = "cpu",
    *,
    parts: Collection[str] | None = None,
    mapped: bool = False,
    verify: bool = True,
) -> State:
    """The tree that was saved, bit for bit, whoever saved it in whatever layout.

    Args:
        location: of one step.
        device: where the tensors should be; they pass through host memory one by one.
        parts: only these top-level keys; other files are not even opened. None: everything.
        mapped: on the CPU, give views of the file's pages instead of own memory where a tensor lies in one piece:
            nothing is read before it is used, with `verify=False`. Writing into such a tensor does not change the file.
        verify: compare every checksum.

    Raises:
        CheckpointError: naming the file and the tensor that is missing, cut short, changed, or unknown here.
    """
    with CheckpointReader(location) as saved, ThreadPoolExecutor(THREADS) as pool:
        tree = saved.tree(parts)
        names = saved.names_in(tree)

        def one(name: str) -> Tensor:
            return saved.tensor(name, device, mapped=mapped, verify=verify)

        tensors = dict(zip(names, pool.map(one, names), strict=True))
        state: State = put_together(tree, tensors.__getitem__)
        return state
