"""What the index says of tensors and files, in the words of the safetensors format.

The format (github.com/huggingface/safetensors): 8 bytes with the header's length, the header as JSON (name -> dtype,
shape, byte range), then the tensors without gaps. Written and read here and not by the library because every tensor's
checksum is computed while the disk is busy with it, nothing is copied as a whole, and what was written can be told
when the disk is full. Tests read these files with the library, and the library's files with this reader.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

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


def checksum_text(value: int) -> str:
    """A CRC-32 as the index writes it. CRC-32 runs at 2.9 GB/s here (SHA-256 1.5, BLAKE2b 0.6); the danger is
    accident, not forgery, and every error of up to 32 neighbouring bits is found.
    """
    return f"crc32:{value:08x}"


def data_bytes(dtype: str, shape: Sequence[int]) -> int:
    """Size of a tensor's data, from its dtype and shape as the file states them."""
    count = math.prod(shape)
    return count // 2 if dtype == "F4" else count * DTYPES[dtype].itemsize


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
