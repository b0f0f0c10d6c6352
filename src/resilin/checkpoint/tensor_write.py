"""Writing safetensors files in a stream, with a checksum of every byte."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from resilin.checkpoint.atomic import new_file, write_all
from resilin.checkpoint.errors import CheckpointError
from resilin.checkpoint.tensor_record import DTYPE_NAMES, FileRecord, TensorRecord, checksum_text

_WRITE_BYTES = 8 << 20
_SYNC_BYTES = 64 << 20
_THREAD_BYTES = 1 << 20  # below this a checksum costs less than handing it to a thread


def check_tensor(where: str, tensor: Tensor) -> None:
    """Refuse a tensor whose elements safetensors cannot hold, before anything is written.

    Raises:
        CheckpointError: naming the tensor and what to do.
    """
    reason = None
    if tensor.is_meta:
        reason = "it is on the meta device and has no values; initialise the model first"
    elif tensor.layout != torch.strided or tensor.is_quantized:
        reason = f"its layout is {tensor.layout} (quantized: {tensor.is_quantized}); save its parts as plain tensors"
    elif type(tensor) not in (Tensor, torch.nn.Parameter, torch.nn.Buffer):
        reason = f"it is a {type(tensor).__module__}.{type(tensor).__name__}; save the plain tensors it is made of"
    elif tensor.dtype not in DTYPE_NAMES or (tensor.dtype == torch.float4_e2m1fn_x2 and tensor.dim() == 0):
        reason = f"safetensors cannot hold {tensor.dtype} of this shape; save a view of it, such as view(torch.uint8)"
    if reason:
        raise CheckpointError(f"tensor {where!r} cannot be saved: {reason}")


def _shape_in_file(tensor: Tensor) -> list[int]:
    shape = list(tensor.shape)
    return [*shape[:-1], shape[-1] * 2] if DTYPE_NAMES[tensor.dtype] == "F4" else shape


def host_bytes(tensor: Tensor) -> memoryview:
    """A tensor's elements as the file holds them."""
    # Copies only what is not already contiguous in host memory.
    plain = tensor.detach().resolve_conj().resolve_neg()
    if plain.element_size() == 1:
        plain = plain.view(torch.uint8)  # the narrowest types can do little but be viewed
    plain = plain.to("cpu").contiguous()
    return plain.reshape(-1).view(torch.uint8).numpy().data


def tensor_header(tensors: Mapping[str, Tensor]) -> bytes:
    """What a file of these tensors, in this order, begins with."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, tensor in tensors.items():
        end = offset + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": DTYPE_NAMES[tensor.dtype],
            "shape": _shape_in_file(tensor),
            "data_offsets": [offset, end],
        }
        offset = end
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-(8 + len(raw)) % 64)  # the data begins at a multiple of 64 bytes
    return len(raw).to_bytes(8, "little") + raw


def in_order(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Large elements first, so that each tensor's data is aligned to its elements without gaps."""
    return dict(sorted(tensors.items(), key=lambda item: -item[1].element_size()))


def write_tensor_file(
    path: Path, tensors: Mapping[str, Tensor], pool: ThreadPoolExecutor
) -> tuple[FileRecord, dict[str, TensorRecord]]:
    """Write a new safetensors file and bring it to disk.

    Args:
        path: must not exist.
        tensors: by their name in the file; checked with `check_tensor` before.
        pool: threads for checksums and early syncing; two are enough.

    Returns:
        The file's record and each tensor's, by name.

    Raises:
        OSError: whatever the system says; the unfinished file is left behind.
    """
    ordered = in_order(tensors)
    header = tensor_header(ordered)
    sums: dict[str, int | Future[int]] = {}
    syncs: list[Future[None]] = []
    unsynced = total = 0
    with new_file(path) as handle:
        try:
            write_all(handle, header)
            total = len(header)
            for name, tensor in ordered.items():
                data = host_bytes(tensor)
                sums[name] = pool.submit(zlib.crc32, data) if len(data) > _THREAD_BYTES else zlib.crc32(data)
                for start in range(0, len(data), _WRITE_BYTES):
                    piece = data[start : start + _WRITE_BYTES]
                    write_all(handle, piece)
                    unsynced += len(piece)
                    if unsynced >= _SYNC_BYTES and all(sync.done() for sync in syncs):
                        # Keeps the disk busy from the start: 0.5 GiB is then on disk about a third sooner.
                        syncs.append(pool.submit(os.fsync, handle))
                        unsynced = 0
                total += len(data)
        finally:
            for sync in syncs:
                sync.result()
    records = {}
    for name, tensor in ordered.items():
        value = sums[name]
        checksum = checksum_text(value if isinstance(value, int) else value.result())
        shape = tuple(_shape_in_file(tensor))
        records[name] = TensorRecord(path.name, name, DTYPE_NAMES[tensor.dtype], shape, checksum)
    return FileRecord(total, checksum_text(zlib.crc32(header))), records
