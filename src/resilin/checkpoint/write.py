"""Writing the files of one checkpoint, and the index from what every rank says it wrote."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from resilin.checkpoint.errors import CheckpointError
from resilin.checkpoint.index import COPY_NAME, INDEX_NAME, Index, index_text, parse_index, read_index
from resilin.checkpoint.link import link_unchanged
from resilin.checkpoint.share import Piece, part_of, whole_share
from resilin.checkpoint.storage import Folder, Location, folder_at, join
from resilin.checkpoint.tensor_record import DTYPE_NAMES, FileRecord, TensorRecord
from resilin.checkpoint.tensor_write import write_tensor_file
from resilin.checkpoint.tree import take_apart
from resilin.checkpoint.tree_merge import merge_trees
from resilin.layout import Boxes

Row = list[Any]
"""A written piece: tensor, dtype, shape, number of the file, name in it, first byte, offsets, sizes, checksums."""


def _inner(piece: Piece) -> str:
    """What a piece is called in its file; '~' and a letter or bracket cannot come from an escaped key."""
    part = part_of(piece.tensor)
    inner = piece.tensor if piece.tensor == part else piece.tensor[len(part) + 1 :]
    inner = "~m" if inner == "__metadata__" else inner  # it has a meaning of its own in the format
    return inner if piece.whole else f"{inner}~{str(piece.region).replace(' ', '')}"


def file_groups(pieces: Iterable[Piece], suffix: str = "") -> dict[str, dict[str, Piece]]:
    """Which piece goes where: file -> name in the file -> piece. One file for each top-level key of the tree.

    Args:
        pieces: to be written.
        suffix: of the files' names before the extension: "-00001-of-00004" where several ranks write.
    """
    groups: dict[str, dict[str, Piece]] = {}
    for piece in pieces:
        part = part_of(piece.tensor)
        group = groups.setdefault("" if piece.tensor == part else part, {})
        group[_inner(piece)] = piece
    files: dict[str, dict[str, Piece]] = {}
    taken: set[str] = set()
    for number, part in enumerate(sorted(groups)):
        # Some file systems do not tell Model from model.
        plain = re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}", part) and part.lower() not in taken
        stem = part if plain else f"tensors~{number}"  # no part is called so
        taken.add(stem.lower())
        files[f"{stem}{suffix}.safetensors"] = groups[part]
    return files


def write_files(
    folder: Folder, pieces: Iterable[Piece], suffix: str = "", earlier: Folder | None = None
) -> dict[str, Any]:
    """Write one rank's tensor files, all of them on disk when this returns.

    A file that would be byte for byte one of the earlier checkpoint is linked to it instead: what a run does not
    change (a frozen base) is on the disk once.

    Args:
        folder: where.
        pieces: what the rank writes.
        suffix: of its files' names.
        earlier: a whole checkpoint on the same disk.

    Returns:
        What `assemble` needs of it, as JSON.

    Raises:
        OSError: whatever the system says; what was written until then is left behind.
    """
    files: list[list[Any]] = []
    rows: list[Row] = []
    before = _index_of(earlier)
    with ThreadPoolExecutor(2) as pool:
        for file, members in file_groups(pieces, suffix).items():
            linked = None if earlier is None else link_unchanged(earlier, before, folder, file, members)
            record, written = linked or write_tensor_file(folder, file, members, pool)
            for name, piece in members.items():
                shape, region, at = list(piece.shape), piece.region, written[name]
                where = [len(files), name, at.begin, list(region.offsets), list(region.sizes), list(at.checksums)]
                rows.append([piece.tensor, DTYPE_NAMES[piece.dtype], shape, *where])
            files.append([record.name, record.bytes, record.header_checksum])
    return {"files": files, "pieces": rows}


def _index_of(folder: Folder | None) -> Index | None:
    try:
        return None if folder is None else read_index(folder)
    except CheckpointError:
        return None


def assemble(step: int, trees: Sequence[Any], written: Sequence[Mapping[str, Any]]) -> Index:
    """The index of what all ranks wrote.

    Args:
        step: steps committed.
        trees: of each rank, as JSON.
        written: what `write_files` said at each.

    Raises:
        CheckpointError: where trees contradict each other, or a tensor has another shape or dtype at another rank.
    """
    files: list[FileRecord] = []
    rows: dict[str, list[Row]] = {}
    for part in written:
        first = len(files)
        files += [FileRecord(*entry) for entry in part["files"]]
        for name, *row in part["pieces"]:
            rows.setdefault(name, []).append([*row[:2], row[2] + first, *row[3:]])
    order = sorted(range(len(files)), key=lambda number: files[number].name)
    place = {number: position for position, number in enumerate(order)}
    tensors = {}
    for name in sorted(rows):
        mine = sorted(rows[name], key=lambda row: (row[5], row[6]))
        dtype, shape = mine[0][0], tuple(mine[0][1])
        if any((row[0], tuple(row[1])) != (dtype, shape) for row in mine):
            raise CheckpointError(f"tensor {name!r} has one dtype or shape at one rank and another at the next")
        size = len(mine), len(shape)
        boxes = Boxes(
            np.array([row[5] for row in mine], np.int64).reshape(size),
            np.array([row[6] for row in mine], np.int64).reshape(size),
        )
        tensors[name] = TensorRecord(
            dtype,
            shape,
            np.array([place[row[2]] for row in mine], np.int64),
            tuple(row[3] for row in mine),
            np.array([row[4] for row in mine], np.int64),
            boxes,
            tuple(tuple(row[7]) for row in mine),
        )
    return Index(step, [files[number] for number in order], tensors, merge_trees(trees, tensors))


def write_index(folder: Folder, index: Index, *, second_copy: bool = False) -> int:
    """Write the index last, which completes the checkpoint; the names of all files are on disk too when this returns.

    Returns:
        Bytes of all files, linked ones too.

    Raises:
        CheckpointError: the pieces do not make whole tensors; nothing is written.
        OSError: whatever the system says.
    """
    raw = index_text(index)
    parse_index(raw, str(join(folder.location, INDEX_NAME)))  # whatever a reader would refuse is found now
    if second_copy:
        folder.write(COPY_NAME, raw)
    folder.write(INDEX_NAME, raw)
    folder.finish()
    return len(raw) * (1 + second_copy) + index.bytes


def write_checkpoint(location: Location, step: int, tree: Mapping[str, Any], *, second_copy: bool = False) -> int:
    """Write one checkpoint by one process into an empty folder: `model.safetensors`, ..., `index.json`.

    For conversions and other tools; a run saves through `CheckpointFolder`, which adds the temporary name, the lock
    and the cleaning up. Each tensor is in memory only while it is written where it is a `Deferred`; the same state
    always gives the same bytes.

    Args:
        location: of the checkpoint: a folder that exists and is empty, or a URL with nothing under it.
        step: steps committed.
        tree: dicts with text keys and lists; at the leaves tensors, `Deferred` tensors and JSON values.
        second_copy: whether to write the index twice.

    Returns:
        Bytes written.

    Raises:
        CheckpointError: for what cannot be saved, naming its place, before anything is written.
        OSError: whatever the system says; what was written until then is left behind, without an index.
    """
    share, folder = whole_share(take_apart(tree)), folder_at(location)
    index = assemble(step, [share.tree], [write_files(folder, share.pieces)])
    return write_index(folder, index, second_copy=second_copy)
