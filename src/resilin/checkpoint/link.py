"""A tensor file that an earlier checkpoint holds already, byte for byte, is linked and not written again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from resilin.checkpoint.index import Index
from resilin.checkpoint.share import Piece
from resilin.checkpoint.storage import Folder, Reader
from resilin.checkpoint.tensor_record import FileRecord
from resilin.checkpoint.tensor_write import Written, host_bytes, in_order, tensor_header

_PIECE = 8 << 20
LINK_FROM = 1 << 20
"""Bytes from which a file is looked for in the earlier checkpoint: small ones are as quick to write."""


def link_unchanged(
    source: Folder, index: Index | None, target: Folder, file: str, pieces: Mapping[str, Piece]
) -> tuple[FileRecord, dict[str, Written]] | None:
    """Make a file of `target` a hard link to that of `source` where it holds exactly these pieces.

    Every byte is compared, so that neither a chance agreement of checksums nor a file damaged since can pass; the
    first byte that differs ends the comparison, which costs next to nothing for what is being trained.

    Args:
        source: the earlier checkpoint.
        index: of that checkpoint; None: there is none.
        target: must not have the file.
        file: its name, in both.
        pieces: by their name in the file.

    Returns:
        The records of the file and its pieces; None where the file has to be written.
    """
    number = next((n for n, record in enumerate(index.files if index else ()) if record.name == file), None)
    if index is None or number is None or index.files[number].bytes < LINK_FROM:
        return None
    own: dict[str, Written] = {}
    for record in index.tensors.values():
        for row in np.flatnonzero(record.files == number).tolist():
            if record.whole_checksums:  # an index of version 1, whose checksums mean something else
                return None
            own[record.names[row]] = Written(int(record.begins[row]), record.checksums[row])
    ordered = in_order(pieces)
    try:
        if set(own) != set(ordered):
            return None
        reader = source.open(file)
        try:
            same = _same(reader, ordered)
        finally:
            reader.close()
    except (OSError, EOFError):  # gone meanwhile
        return None
    if not same or not target.link(source, file):
        return None
    return replace(index.files[number], name=file), {name: own[name] for name in ordered}


def _same(reader: Reader, ordered: Mapping[str, Piece]) -> bool:
    header = tensor_header(ordered)
    if reader.size != len(header) + sum(piece.bytes for piece in ordered.values()):
        return False
    buffer = memoryview(bytearray(max(_PIECE, len(header))))
    reader.read_into(buffer[: len(header)], 0)
    if buffer[: len(header)] != header:
        return False
    at = len(header)
    for piece in ordered.values():
        data = np.frombuffer(host_bytes(piece.read()), np.uint8)
        for start in range(0, len(data), _PIECE):
            part = data[start : start + _PIECE]
            reader.read_into(buffer[: len(part)], at)
            if not np.array_equal(np.frombuffer(buffer, np.uint8, len(part)), part):
                return False
            at += len(part)
    return True
