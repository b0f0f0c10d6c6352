"""What the index says of tensors, their pieces and the files, in the words of the safetensors format.

The format (github.com/huggingface/safetensors): 8 bytes with the header's length, the header as JSON (name -> dtype,
shape, byte range), then the tensors without gaps. Written and read here and not by the library because every tensor's
checksum is computed while the disk is busy with it, nothing is copied as a whole, and what was written can be told
when the disk is full. Tests read these files with the library, and the library's files with this reader.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import xxhash

from resilin.layout import Boxes, Holdings, Region
from resilin.layout.boxes import Ints

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


BLOCK_BYTES = 1 << 20
"""Bytes under one checksum: whoever needs some rows of a piece reads and checks the blocks they lie in, no more."""


def checksum_text(value: int) -> str:
    """The CRC-32 of an index or a header as the index writes it: every error of up to 32 neighbouring bits is found."""
    return f"crc32:{value:08x}"


def block_checksum(data: memoryview) -> int:
    """The lower 32 bits of XXH3-64, which runs as fast as memory is read, where CRC-32 makes 2.6 GB/s a core and a load
    wait for it. The danger is accident, not forgery: one damaged block in four thousand million passes.
    """
    return int(xxhash.xxh3_64_intdigest(data)) & 0xFFFFFFFF


def block_checksums(data: memoryview) -> tuple[int, ...]:
    """The checksum of each block of a piece's bytes, the last one shorter; none for no bytes."""
    return tuple(block_checksum(data[start : start + BLOCK_BYTES]) for start in range(0, len(data), BLOCK_BYTES))


def shape_in_file(dtype: str, shape: Sequence[int]) -> tuple[int, ...]:
    """A shape (or offsets) as safetensors counts it: it counts the numbers where torch counts pairs of F4."""
    return (*shape[:-1], shape[-1] * 2) if dtype == "F4" and len(shape) else tuple(shape)


def shape_in_torch(dtype: str, shape: Sequence[int]) -> tuple[int, ...]:
    """The other way."""
    return (*shape[:-1], shape[-1] // 2) if dtype == "F4" and len(shape) else tuple(shape)


def data_bytes(dtype: str, shape: Sequence[int]) -> int:
    """Size of data of this dtype and shape, as torch counts it."""
    return math.prod(shape) * DTYPES[dtype].itemsize


@dataclass(frozen=True, eq=False)
class TensorRecord:
    """One tensor as the index lists it: what it is, and which region of it lies where. Shapes: N pieces, D dimensions.

    Attributes:
        dtype: its name in safetensors.
        shape: of the whole tensor, as torch counts it.
        files: (N,) the number of the file each piece is in.
        names: what each piece is called in the header of its file.
        begins: (N,) the byte of the file where each begins; -1: as the file's header says (version 1).
        boxes: the regions.
        checksums: of each piece, one for each block; version 1 has one for the whole piece.
    """

    dtype: str
    shape: tuple[int, ...]
    files: Ints
    names: tuple[str, ...]
    begins: Ints
    boxes: Boxes
    checksums: tuple[tuple[int, ...], ...]
    whole_checksums: bool = False
    """Whether a checksum is of a whole piece instead of a block (version 1)."""

    @classmethod
    def alone(
        cls, dtype: str, shape: Sequence[int], file: int, name: str, begin: int, checksums: tuple[int, ...]
    ) -> TensorRecord:
        """A tensor of one piece."""
        boxes = Boxes.of([Region.whole(shape)], len(shape))
        number, at = np.array([file], np.int64), np.array([begin], np.int64)
        return cls(dtype, tuple(shape), number, (name,), at, boxes, (checksums,))

    def __len__(self) -> int:
        return len(self.files)

    @property
    def bytes(self) -> int:
        """Size of its data."""
        return data_bytes(self.dtype, self.shape)

    @property
    def is_whole(self) -> bool:
        """Whether it lies in one piece."""
        return len(self) == 1 and tuple(self.boxes.sizes[0].tolist()) == self.shape

    def holdings(self) -> Holdings:
        """Its pieces as the layout algebra knows them: row n is piece n, and every element is there once."""
        strides = np.zeros_like(self.boxes.sizes)
        buffers, starts = np.full(len(self), -1, np.int32), np.zeros(len(self), np.int64)
        places = self.files.astype(np.int32)
        return Holdings(self.shape, layout_dtype(self.dtype), places, self.boxes, starts, strides, buffers, copies=1)


def layout_dtype(dtype: str) -> str:
    """The dtype as the layout algebra knows it: a pair of F4 is a byte."""
    return "U8" if dtype == "F4" else dtype


@dataclass(frozen=True)
class FileRecord:
    """One file as the index lists it. Header and pieces together are all its bytes, so these sums cover it."""

    name: str
    bytes: int
    header_checksum: str
