"""A tensor file that an earlier checkpoint holds already, byte for byte, is linked and not written again."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from torch import Tensor

from resilin.checkpoint.index import Index
from resilin.checkpoint.tensor_record import FileRecord, TensorRecord
from resilin.checkpoint.tensor_write import host_bytes, in_order, tensor_header

_PIECE = 8 << 20
LINK_FROM = 1 << 20
"""Bytes from which a file is looked for in the earlier checkpoint: small ones are as quick to write."""


def link_unchanged(
    source: Path, index: Index | None, target: Path, tensors: Mapping[str, Tensor]
) -> tuple[FileRecord, dict[str, TensorRecord]] | None:
    """Make `target` a hard link to `source` where that holds exactly these tensors.

    Every byte is compared, so that neither a chance agreement of checksums nor a file damaged since can pass; the
    first byte that differs ends the comparison, which costs next to nothing for what is being trained.

    Args:
        source: of the earlier checkpoint.
        index: of that checkpoint; None: there is none.
        target: must not exist.
        tensors: by their name in the file.

    Returns:
        The records of the file and its tensors; None where the file has to be written.
    """
    if index is None or source.name not in index.files:
        return None
    record, ordered = index.files[source.name], in_order(tensors)
    if record.bytes < LINK_FROM:
        return None
    own = {item.name: item for item in index.tensors.values() if item.file == source.name}
    try:
        if set(own) != set(ordered) or not _same(source, ordered):
            return None
        os.link(source, target)
    except OSError:  # gone meanwhile, or a file system without links
        return None
    return record, {name: own[name] for name in ordered}


def _same(path: Path, ordered: Mapping[str, Tensor]) -> bool:
    header = tensor_header(ordered)
    with path.open("rb", buffering=0) as file:
        if os.fstat(file.fileno()).st_size != len(header) + sum(t.numel() * t.element_size() for t in ordered.values()):
            return False
        if file.read(len(header)) != header:
            return False
        for tensor in ordered.values():
            data = np.frombuffer(host_bytes(tensor), np.uint8)
            for start in range(0, len(data), _PIECE):
                piece = data[start : start + _PIECE]
                raw = file.read(len(piece))
                if len(raw) != len(piece) or not np.array_equal(np.frombuffer(raw, np.uint8), piece):
                    return False
    return True
