"""Safetensors files, written and read in streams with a checksum of every byte.

The format (github.com/huggingface/safetensors): 8 bytes with the header's length, the header as JSON (name -> dtype,
shape, byte range), then the tensors without gaps. Written here and not by the library because every tensor's
checksum is computed while the disk is busy with it, nothing is copied as a whole, and what was written can be told
when the disk is full. Tests read these files with the library, and the library's files with this reader.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import zlib
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from resilin.checkpoint.atomic import new_file, write_all
from resilin.checkpoint.errors import CheckpointError

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
    "F4": torch.float4_e2m1fn_x2,  # two numbers a byte: torch counts the pairs in a shape, safetensors the numbers
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

_WRITE_BYTES = 8 << 20
_SYNC_BYTES = 64 << 20
_HEADER_LIMIT = 100_000_000  # the library's own


def checksum_text(value: int) -> str:
    """A CRC-32 as the index writes it. CRC-32 runs at 2.9 GB/s here (SHA-256 1.5, BLAKE2b 0.6); the danger is
    accident, not forgery, and every error of up to 32 neighbouring bits is found.
    """
    return f"crc32:{value:08x}"


def data_bytes(dtype: str, shape: Sequence[int]) -> int:
    """Size of a tensor's data, from its dtype and shape as the file states them."""
    count = math.prod(shape)
    return count // 2 if dtype == "F4" else count * DTYPES[dtype].itemsize


def _shape_in_file(tensor: Tensor) -> list[int]:
    shape = list(tensor.shape)
    return [*shape[:-1], shape[-1] * 2] if DTYPE_NAMES[tensor.dtype] == "F4" else shape


def _shape_in_torch(dtype: str, shape: Sequence[int]) -> list[int]:
    return [*shape[:-1], shape[-1] // 2] if dtype == "F4" else list(shape)


@dataclass(frozen=True)
class TensorRecord:
    """One tensor as the index lists it: where it is, what it is, and the checksum of its bytes."""

    file: str
    name: str
    dtype: str
    shape: tuple[int, ...]
    checksum: str

    @property
    def bytes(self) -> int:
        """Size of its data."""
        return data_bytes(self.dtype, self.shape)


@dataclass(frozen=True)
class FileRecord:
    """One file as the index lists it. Header and tensors together are all its bytes, so these sums cover it."""

    bytes: int
    header_checksum: str


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


def _host_bytes(tensor: Tensor) -> memoryview:
    # Copies only what is not already contiguous in host memory.
    plain = tensor.detach().resolve_conj().resolve_neg()
    if plain.element_size() == 1:
        plain = plain.view(torch.uint8)  # the narrowest types can do little but be viewed
    plain = plain.to("cpu").contiguous()
    return plain.reshape(-1).view(torch.uint8).numpy().data


def _header(tensors: Mapping[str, Tensor]) -> bytes:
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
    # Large elements first, so that each tensor's data is aligned to its elements without gaps.
    ordered = dict(sorted(tensors.items(), key=lambda item: -item[1].element_size()))
    header = _header(ordered)
    sums: dict[str, Future[int]] = {}
    syncs: list[Future[None]] = []
    unsynced = total = 0
    with new_file(path) as handle:
        try:
            write_all(handle, header)
            total = len(header)
            for name, tensor in ordered.items():
                data = _host_bytes(tensor)
                sums[name] = pool.submit(zlib.crc32, data)
                for start in range(0, len(data), _WRITE_BYTES):
                    piece = data[start : start + _WRITE_BYTES]
                    write_all(handle, piece)
                    unsynced += len(piece)
                    if unsynced >= _SYNC_BYTES and all(sync.done() for sync in syncs):
                        # Keeps the disk busy from the start: 0.5 GiB is then on disk about a third sooner.
                        syncs.append(pool.submit(os.fdatasync, handle))
                        unsynced = 0
                total += len(data)
        finally:
            for sync in syncs:
                sync.result()
    records = {
        name: TensorRecord(
            path.name,
            name,
            DTYPE_NAMES[tensor.dtype],
            tuple(_shape_in_file(tensor)),
            checksum_text(sums[name].result()),
        )
        for name, tensor in ordered.items()
    }
    return FileRecord(total, checksum_text(zlib.crc32(header))), records


class TensorFile:
    """A safetensors file opened for reading, its header checked.

    Args:
        path: the file.
        record: what the index says of it; None for a file of unknown origin, whose size and checksum go unchecked.

    Raises:
        CheckpointError: when it is missing, cut short, or its header is not what was written.
    """

    def __init__(self, path: Path, record: FileRecord | None = None) -> None:
        self.path = path
        try:
            self._handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            raise CheckpointError(f"{path}: the file is missing") from None
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be opened: {error.strerror}") from None
        try:
            self._size = os.fstat(self._handle).st_size
            if record is not None and self._size != record.bytes:
                raise CheckpointError(
                    f"{path}: has {self._size} bytes, but {record.bytes} were written; the file was cut or changed"
                )
            self._start, self.entries = self._read_header(record)
        except BaseException:
            os.close(self._handle)
            raise
        self._mapping: mmap.mmap | None = None

    def _read_header(self, record: FileRecord | None) -> tuple[int, dict[str, dict[str, Any]]]:
        length = int.from_bytes(os.pread(self._handle, 8, 0), "little")
        if not 2 <= length <= min(self._size - 8, _HEADER_LIMIT):
            raise CheckpointError(
                f"{self.path}: its header claims {length} of {self._size} bytes; the file is damaged"
            )
        raw = os.pread(self._handle, 8 + length, 0)
        if record is not None and checksum_text(zlib.crc32(raw)) != record.header_checksum:
            raise CheckpointError(
                f"{self.path}: the checksum of its header (the first {len(raw)} bytes) is wrong; the file is damaged"
            )
        try:
            header = json.loads(raw[8:])
            entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
            for entry in entries.values():
                (begin, end), shape = entry["data_offsets"], entry["shape"]
                size = data_bytes(entry["dtype"], shape)
                if not (0 <= begin <= end <= self._size - len(raw) and end - begin == size):
                    raise ValueError(f"byte range {begin}-{end} does not fit {entry['dtype']} {shape}")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{self.path}: its header cannot be read: {error}") from None
        return len(raw), entries

    def _fill(self, target: memoryview, start: int) -> None:
        while len(target):
            count = os.preadv(self._handle, [target], start)
            if count == 0:
                raise CheckpointError(f"{self.path}: ended while it was read")
            target, start = target[count:], start + count

    def _mapped(self, begin: int, end: int) -> Tensor:
        if self._mapping is None:
            # Private: whoever writes into a mapped tensor changes a copy of the page, never the file.
            self._mapping = mmap.mmap(self._handle, 0, access=mmap.ACCESS_COPY)
        return torch.frombuffer(self._mapping, dtype=torch.uint8, offset=begin, count=end - begin)

    def read(self, record: TensorRecord, device: torch.device, *, mapped: bool, verify: bool) -> Tensor:
        """One tensor.

        Args:
            record: from the index.
            device: where it should be.
            mapped: on the CPU, return a view of the file's pages, read when touched, instead of own memory.
            verify: compute its checksum and compare.

        Raises:
            CheckpointError: naming the tensor, when it is absent, of another shape or type, or damaged.
        """
        entry = self.entries.get(record.name)
        if entry is None:
            raise CheckpointError(f"{self.path}: tensor {record.name!r} is missing")
        if (entry["dtype"], tuple(entry["shape"])) != (record.dtype, record.shape):
            raise CheckpointError(
                f"{self.path}: tensor {record.name!r} is {entry['dtype']} {entry['shape']}, but the index says "
                f"{record.dtype} {list(record.shape)}"
            )
        begin, end = (self._start + offset for offset in entry["data_offsets"])
        dtype, shape = DTYPES[record.dtype], _shape_in_torch(record.dtype, record.shape)
        if begin == end:
            return torch.empty(shape, dtype=dtype, device=device)
        if mapped or device.type != "cpu":
            raw = self._mapped(begin, end)
        else:
            # Own memory is aligned as torch likes it, so kernels take the same path as before the save; and reading
            # into it is faster than copying out of a mapping, which would fault in every page once more.
            raw = torch.empty(end - begin, dtype=torch.uint8)
            self._fill(raw.numpy().data, begin)
        if verify and checksum_text(zlib.crc32(raw.numpy().data)) != record.checksum:
            raise CheckpointError(
                f"{self.path}: the checksum of tensor {record.name!r} (bytes {begin} to {end}) is wrong; "
                "the file is damaged"
            )
        return raw.view(dtype).reshape(shape).to(device)

    def close(self) -> None:
        """Close the file; mapped tensors stay readable, since the mapping lives as long as they do."""
        os.close(self._handle)
