"""Tensors whose memory is a file that has no name: what a format wants in one piece need not fit into memory."""

from __future__ import annotations

import os
from pathlib import Path
from tempfile import mkstemp

import torch
from torch import Tensor


def mapped_zeros(folder: Path, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Zeros in a mapped file of a folder. The file has no name: its space is free again when the tensor is gone.

    Args:
        folder: of the file system that has the space.
        shape: of the tensor.
        dtype: of its elements.
    """
    count = torch.Size(shape).numel()
    if count == 0:
        return torch.empty(shape, dtype=dtype)
    handle, name = mkstemp(prefix=".mapped-", dir=folder)
    os.close(handle)
    try:
        raw = torch.from_file(name, shared=True, size=count * dtype.itemsize, dtype=torch.uint8)
    finally:
        Path(name).unlink()
    return raw.view(dtype).reshape(shape)
