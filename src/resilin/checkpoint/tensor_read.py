"""Reading safetensors files: nothing in them is trusted, every byte can be compared with its checksum."""

from __future__ import annotations

import json
import zlib
from typing import Any

import torch
from torch import Tensor

from resilin.checkpoint.errors import DamagedError
from resilin.checkpoint.spans import spans
from resilin.checkpoint.storage import Folder, join
from resilin.checkpoint.tensor_record import (
    BLOCK_BYTES,
    DTYPES,
    FileRecord,
    TensorRecord,
    block_checksum,
    checksum_text,
    data_bytes,
    shape_in_file,
    shape_in_torch,
)
from resilin.layout import Region, row_major

_HEADER_LIMIT = 100_000_000  # the library's own
_SPAN_BYTES = 32 << 20
_ROW_BYTES = 4 * BLOCK_BYTES
WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Types to move elements in, by their bytes: they are only copied, and the narrowest types can do little else."""


class TensorFile:
    """A safetensors file opened for reading, its header checked.

    Args:
        folder: that it lies in.
        name: of the file.
        record: what the index says of it; None for a file of unknown origin, whose size and checksum go unchecked.

    Raises:
        DamagedError: when it is missing, cut short, or its header is not what was written.
    """

    def __init__(self, folder: Folder, name: str, record: FileRecord | None = None) -> None:
        self.path = join(folder.location, name)
        try:
            self._reader = folder.open(name)
        except FileNotFoundError:
            raise DamagedError(f"{self.path}: the file is missing") from None
        except OSError as error:
            raise DamagedError(f"{self.path}: cannot be opened: {error.strerror or error}") from None
        try:
            if record is not None and self._reader.size != record.bytes:
                raise DamagedError(
                    f"{self.path}: has {self._reader.size} bytes, but {record.bytes} were written; "
                    "the file was cut or changed"
                )
            self._start, self.entries = self._read_header(record)
        except BaseException:
            self._reader.close()
            raise

    def _read_header(self, record: FileRecord | None) -> tuple[int, dict[str, dict[str, Any]]]:
        size = self._reader.size
        start = bytearray(min(size, 8))
        self._fill(memoryview(start), 0)
        length = int.from_bytes(start, "little")
        if not 2 <= length <= min(size - 8, _HEADER_LIMIT):
            raise DamagedError(f"{self.path}: its header claims {length} of {size} bytes; the file is damaged")
        raw = bytearray(8 + length)
        self._fill(memoryview(raw), 0)
        if record is not None and checksum_text(zlib.crc32(raw)) != record.header_checksum:
            raise DamagedError(
                f"{self.path}: the checksum of its header (the first {len(raw)} bytes) is wrong; "
                "the file is damaged, or of another save than the index"
            )
        try:
            header = json.loads(raw[8:])
            entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
            for entry in entries.values():
                (begin, end), shape = entry["data_offsets"], entry["shape"]
                count = data_bytes(entry["dtype"], shape_in_torch(entry["dtype"], shape))
                if not (0 <= begin <= end <= size - len(raw) and end - begin == count) or min(shape, default=0) < 0:
                    raise ValueError(f"byte range {begin}-{end} does not fit {entry['dtype']} {shape}")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DamagedError(f"{self.path}: its header cannot be read: {error}") from None
        return len(raw), entries

    def _fill(self, target: memoryview, start: int) -> None:
        try:
            self._reader.read_into(target, start)
        except OSError as error:
            raise DamagedError(f"{self.path}: cannot be read at byte {start}: {error.strerror or error}") from None
        except EOFError:
            raise DamagedError(f"{self.path}: ended while it was read") from None

    def begin(self, record: TensorRecord, piece: int) -> int:
        """The byte where a piece begins, once index and header were found to agree on it.

        Raises:
            DamagedError: naming the tensor, when it is absent, or of another shape or type.
        """
        name, sizes = record.names[piece], tuple(record.boxes.sizes[piece].tolist())
        entry = self.entries.get(name)
        if entry is None:
            raise DamagedError(f"{self.path}: tensor {name!r} is missing")
        shape = shape_in_file(record.dtype, sizes)
        if (entry["dtype"], tuple(entry["shape"])) != (record.dtype, shape):
            raise DamagedError(
                f"{self.path}: tensor {name!r} is {entry['dtype']} {entry['shape']}, but the index says "
                f"{record.dtype} {list(shape)}"
            )
        begin, said = self._start + entry["data_offsets"][0], int(record.begins[piece])
        if said not in (-1, begin):
            raise DamagedError(f"{self.path}: tensor {name!r} begins at byte {begin}, but the index says {said}")
        return int(begin)

    def mapped(self, record: TensorRecord, piece: int, *, verify: bool) -> Tensor | None:
        """A view of the pages of a whole piece; None where the storage maps nothing.

        Raises:
            DamagedError: naming the tensor.
        """
        begin, mapping = self.begin(record, piece), self._reader.mapped()
        sizes = tuple(record.boxes.sizes[piece].tolist())
        count = data_bytes(record.dtype, sizes)
        if mapping is None or not count:
            return None
        raw = torch.frombuffer(mapping, dtype=torch.uint8, offset=begin, count=count)
        if verify:
            self._compare(raw.numpy().data, record, piece, begin, 0)
        return raw.view(DTYPES[record.dtype]).reshape(sizes)

    def read(self, record: TensorRecord, piece: int, region: Region, target: Tensor, *, verify: bool) -> None:
        """Copy a region of a piece to memory.

        Args:
            record: of the tensor.
            piece: its number there.
            region: of the piece, counted from its own beginning.
            target: on the CPU, of the region's sizes, with any strides.
            verify: compare the checksums of all blocks that the region touches; they are then read whole.

        Raises:
            DamagedError: naming the tensor.
        """
        begin, sizes = self.begin(record, piece), tuple(record.boxes.sizes[piece].tolist())
        item = DTYPES[record.dtype].itemsize
        words, strides = target.view(WORDS[item]), row_major(sizes)
        # A piece of version 1 has one checksum: it cannot be read in parts and checked.
        limit = region.numel if record.whole_checksums and verify else max(_SPAN_BYTES // item, 1)
        row = _ROW_BYTES // item
        for part, first, end in spans(sizes, region, limit=limit, row=row):
            view = words[part.inside(region).slices] if part.sizes else words
            if end - first == part.numel and view.is_contiguous():
                data = view.as_strided((part.numel,), (1,)).view(torch.uint8).numpy().data
                self._checked(data, record, piece, begin, first * item, verify=verify)
            else:
                raw = torch.empty((end - first) * item, dtype=torch.uint8)
                self._checked(raw.numpy().data, record, piece, begin, first * item, verify=verify)
                view.copy_(raw.view(WORDS[item]).as_strided(part.sizes, strides))

    def verify(self, record: TensorRecord, piece: int) -> None:
        """Read a piece and compare its checksums.

        Raises:
            DamagedError: naming the tensor.
        """
        begin, count = self.begin(record, piece), data_bytes(record.dtype, record.boxes.sizes[piece].tolist())
        if record.whole_checksums:
            self._checked(memoryview(bytearray(count)), record, piece, begin, 0, verify=True)
            return
        buffer = memoryview(bytearray(min(count, _SPAN_BYTES)))
        for low in range(0, count, _SPAN_BYTES):
            self._checked(buffer[: count - low], record, piece, begin, low, verify=True)

    def _checked(
        self, target: memoryview, record: TensorRecord, piece: int, begin: int, low: int, *, verify: bool
    ) -> None:
        """Fill `target` with the bytes of a piece from `low` on."""
        if not verify:
            self._fill(target, begin + low)
            return
        count = data_bytes(record.dtype, record.boxes.sizes[piece].tolist())
        block = max(count, 1) if record.whole_checksums else BLOCK_BYTES
        at, high = low, low + len(target)
        while at < high:
            start = at // block * block
            end = min(start + block, count)
            if at == start and high >= end:
                stop = high if high == count else high // block * block
                stop = min(stop, at + max(self._reader.request // block, 1) * block)
                data = target[at - low : stop - low]
                self._fill(data, begin + at)
                self._compare(data, record, piece, begin, at)
                at = stop
            else:
                whole = memoryview(bytearray(end - start))
                self._fill(whole, begin + start)
                self._compare(whole, record, piece, begin, start)
                stop = min(end, high)
                target[at - low : stop - low] = whole[at - start : stop - start]
                at = stop

    def _compare(self, data: memoryview, record: TensorRecord, piece: int, begin: int, low: int) -> None:
        block = max(len(data), 1) if record.whole_checksums else BLOCK_BYTES
        for start in range(0, len(data), block):
            part = data[start : start + block]
            found = zlib.crc32(part) if record.whole_checksums else block_checksum(part)
            if found != record.checksums[piece][(low + start) // block]:
                at = begin + low + start
                raise DamagedError(
                    f"{self.path}: the checksum of tensor {record.names[piece]!r} (bytes {at} to {at + len(part)}) is "
                    "wrong; the file is damaged, or of another save than the index"
                )

    def close(self) -> None:
        """Close the file; mapped tensors stay readable, since the mapping lives as long as they do."""
        self._reader.close()
