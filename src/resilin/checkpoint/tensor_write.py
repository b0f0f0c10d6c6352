"""Writing safetensors files in a stream, with checksums of every byte."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from resilin.checkpoint.share import Piece
from resilin.checkpoint.storage import Folder
from resilin.checkpoint.tensor_record import DTYPE_NAMES, FileRecord, block_checksums, checksum_text, shape_in_file

_WRITE_BYTES = 8 << 20
_SYNC_BYTES = 64 << 20
_THREAD_BYTES = 1 << 20  # below this a checksum costs less than handing it to a thread


@dataclass(frozen=True)
class Written:
    """One piece as it lies in its file.

    Attributes:
        begin: its first byte in the file.
        checksums: of its blocks.
    """

    begin: int
    checksums: tuple[int, ...]


def host_bytes(tensor: Tensor) -> memoryview:
    """A tensor's elements as the file holds them."""
    # Copies only what is not already contiguous in host memory.
    plain = tensor.detach().resolve_conj().resolve_neg()
    if plain.element_size() == 1:
        plain = plain.view(torch.uint8)  # the narrowest types can do little but be viewed
    plain = plain.to("cpu").contiguous()
    # As one row: a tensor of one element is contiguous whatever its stride.
    return plain.as_strided((plain.numel(),), (1,)).view(torch.uint8).numpy().data


def in_order(pieces: Mapping[str, Piece]) -> dict[str, Piece]:
    """Large elements first, so that each piece is aligned to its elements without gaps; then by name."""
    return dict(sorted(pieces.items(), key=lambda item: (-item[1].dtype.itemsize, item[0])))


def tensor_header(ordered: Mapping[str, Piece]) -> bytes:
    """What a file of these pieces, in this order, begins with."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, piece in ordered.items():
        dtype, end = DTYPE_NAMES[piece.dtype], offset + piece.bytes
        shape = list(shape_in_file(dtype, piece.region.sizes))
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, end]}
        offset = end
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-(8 + len(raw)) % 64)  # the data begins at a multiple of 64 bytes
    return len(raw).to_bytes(8, "little") + raw


def write_tensor_file(
    folder: Folder, file: str, pieces: Mapping[str, Piece], pool: ThreadPoolExecutor
) -> tuple[FileRecord, dict[str, Written]]:
    """Write a new safetensors file and bring it to disk. One piece is in memory at a time, where it is not already.

    Args:
        folder: where; it must not have the file.
        file: its name.
        pieces: by their name in the file.
        pool: threads for checksums and early syncing; two are enough.

    Returns:
        The file's record, and where each piece lies.

    Raises:
        OSError: whatever the system says; the unfinished file is left behind.
    """
    ordered = in_order(pieces)
    header = tensor_header(ordered)
    written: dict[str, Written] = {}
    syncs: list[Future[None]] = []
    unsynced, total = 0, len(header)
    with folder.create(file) as sink:
        try:
            sink.write(header)
            for name, piece in ordered.items():
                data = host_bytes(piece.read())
                if len(data) != piece.bytes:
                    raise ValueError(f"tensor {piece.tensor!r}: {len(data)} bytes came for {piece.region}")
                sums = pool.submit(block_checksums, data) if len(data) > _THREAD_BYTES else None
                for start in range(0, len(data), _WRITE_BYTES):
                    part = data[start : start + _WRITE_BYTES]
                    sink.write(part)
                    unsynced += len(part)
                    if unsynced >= _SYNC_BYTES and all(sync.done() for sync in syncs):
                        # Keeps the disk busy from the start: 0.5 GiB is then on disk about a third sooner.
                        syncs.append(pool.submit(sink.sync))
                        unsynced = 0
                # Waited for here, so that no more than this piece is held.
                written[name] = Written(total, block_checksums(data) if sums is None else sums.result())
                total += len(data)
        finally:
            for sync in syncs:
                sync.result()
    return FileRecord(file, total, checksum_text(zlib.crc32(header))), written
