"""Reading every byte of a checkpoint, and telling everything that is wrong with it."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from resilin.checkpoint.errors import CheckpointError, DamagedError
from resilin.checkpoint.index import COPY_NAME, INDEX_NAME, Index, parse_index, read_index
from resilin.checkpoint.read import THREADS
from resilin.checkpoint.reader import CheckpointReader
from resilin.checkpoint.storage import Folder, Location, folder_at, join
from resilin.checkpoint.tree import put_together


def damages(location: Location) -> Iterator[str]:
    """Everything that is wrong with a checkpoint, each naming its file and tensor; every byte is read.

    Args:
        location: of one step.
    """
    folder = folder_at(location)
    try:
        index = read_index(folder, fall_back=False)
    except CheckpointError as error:
        yield str(error)
        if COPY_NAME not in folder.names():
            return
        try:
            index = read_index(folder)
        except CheckpointError:
            yield f"{join(folder.location, COPY_NAME)}: the second copy of the index is no better"
            return
    yield from _second_copy(folder, index)
    try:
        put_together(index.tree, lambda name: _listed(folder, index, name))
    except CheckpointError as error:
        yield str(error)
    with CheckpointReader(location) as saved, ThreadPoolExecutor(THREADS) as pool:
        for number in range(len(index.files)):
            yield from _file(saved, number, pool)


def verify_checkpoint(location: Location) -> Index:
    """Read every byte of a checkpoint and compare every checksum.

    Returns:
        Its index.

    Raises:
        DamagedError: for the first thing that is wrong, naming file and tensor.
        CheckpointError: it is of a newer version.
    """
    index = read_index(folder_at(location), fall_back=False)
    for damage in damages(location):
        raise DamagedError(damage)
    return index


def _listed(folder: Folder, index: Index, name: str) -> None:
    if name not in index.tensors:
        raise DamagedError(
            f"{join(folder.location, INDEX_NAME)}: its tree names tensor {name!r}, which it does not list"
        )


def _second_copy(folder: Folder, index: Index) -> Iterator[str]:
    if COPY_NAME not in folder.names():
        return
    path = str(join(folder.location, COPY_NAME))
    try:
        raw = folder.read(COPY_NAME)
        parse_index(raw, path)
        if INDEX_NAME in folder.names() and raw != folder.read(INDEX_NAME):
            parse_index(folder.read(INDEX_NAME), "")  # damaged itself: that was told already
            yield f"{path}: is not a copy of {INDEX_NAME}"
    except OSError as error:
        yield f"{path}: cannot be read: {error.strerror or error}"
    except CheckpointError as error:
        if str(error).startswith(path):
            yield str(error)


def _file(saved: CheckpointReader, number: int, pool: ThreadPoolExecutor) -> Iterator[str]:
    """What is wrong with one file: with its header, then with each of its pieces."""
    try:
        with saved.file(number) as file:
            listed = []
            for name, record in saved.index.tensors.items():
                for piece in np.flatnonzero(record.files == number).tolist():
                    listed.append((name, piece))

            def one(item: tuple[str, int]) -> str | None:
                record, piece = saved.index.tensors[item[0]], item[1]
                try:
                    file.verify(record, piece)
                except DamagedError as error:
                    return str(error)
                return None

            yield from filter(None, pool.map(one, listed))
            unlisted = set(file.entries) - {saved.index.tensors[name].names[piece] for name, piece in listed}
            if unlisted:
                yield f"{file.path}: holds tensor {min(unlisted)!r}, which the index does not list"
    except CheckpointError as error:
        yield str(error)
