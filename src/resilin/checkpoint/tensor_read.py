"""Reading safetensors files: nothing in them is trusted, every byte can be compared with its checksum."""

from __future__ import annotations

import json
import mmap
import os
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from resilin.checkpoint.errors import DamagedError
from resilin.checkpoint.tensor_record import DTYPES, FileRecord, TensorRecord, checksum_text, data_bytes

_HEADER_LIMIT = 100_000_000  # the library's own


def _shape_in_torch(dtype: str, shape: Sequence[int]) -> list[int]:
    return [*shape[:-1], shape[-1] // 2] if dtype == "F4" else list(shape)


class TensorFile:
    """A safetensors file opened for reading, its header checked.

    Args:
        path: the file.
        record: what the index says of it; None for a file of unknown origin, whose size and checksum go unchecked.

    Raises:
        DamagedError: when it is missing, cut short, or its header is not what was written.
    """

    def __init__(self, path: Path, record: FileRecord | None = None) -> None:
        self.path = path
        try:
            self._handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            raise DamagedError(f"{path}: the file is missing") from None
        except OSError as error:
            raise DamagedError(f"{path}: cannot be opened: {error.strerror}") from None
        try:
            self._size = os.fstat(self._handle).st_size
            if record is not None and self._size != record.bytes:
                raise DamagedError(
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
            raise DamagedError(f"{self.path}: its header claims {length} of {self._size} bytes; the file is damaged")
        raw = os.pread(self._handle, 8 + length, 0)
        if record is not None and checksum_text(zlib.crc32(raw)) != record.header_checksum:
            raise DamagedError(
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
            raise DamagedError(f"{self.path}: its header cannot be read: {error}") from None
        return len(raw), entries

    def _fill(self, target: memoryview, start: int) -> None:
        while len(target):
            try:
                count = os.preadv(self._handle, [target], start)
            except OSError as error:
                raise DamagedError(f"{self.path}: cannot be read at byte {start}: {error.strerror}") from None
            if count == 0:
                raise DamagedError(f"{self.path}: ended while it was read")
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
            DamagedError: naming the tensor, when it is absent, of another shape or type, or damaged.
        """
        entry = self.entries.get(record.name)
        if entry is None:
            raise DamagedError(f"{self.path}: tensor {record.name!r} is missing")
        if (entry["dtype"], tuple(entry["shape"])) != (record.dtype, record.shape):
            raise DamagedError(
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
            raise DamagedError(
                f"{self.path}: the checksum of tensor {record.name!r} (bytes {begin} to {end}) is wrong; "
                "the file is damaged"
            )
        return raw.view(dtype).reshape(shape).to(device)

    def close(self) -> None:
        """Close the file; mapped tensors stay readable, since the mapping lives as long as they do."""
        os.close(self._handle)
