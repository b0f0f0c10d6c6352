"""idx files, plain or gzipped: the format of MNIST and Fashion-MNIST (LeCun et al., 1998)."""

from __future__ import annotations

import gzip
import math
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from resilin.data.errors import DataError

_TYPES = {8: ">u1", 9: ">i1", 11: ">i2", 12: ">i4", 13: ">f4", 14: ">f8"}


def read_idx(path: Path) -> NDArray[np.generic]:
    """The array of an idx file.

    Raises:
        DataError: when it cannot be read, is not an idx file, or holds fewer or more bytes than its header says.
    """
    try:
        raw = path.read_bytes()
        if raw[:2] == b"\x1f\x8b":
            raw = gzip.decompress(raw)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read: {error}") from None
    if len(raw) < 4 or raw[:2] != b"\0\0" or raw[2] not in _TYPES or not raw[3]:
        raise DataError(f"{path}: is not an idx file: it begins with {raw[:4].hex(' ') or 'nothing'}")
    dimensions, kind = raw[3], np.dtype(_TYPES[raw[2]])
    begin = 4 + 4 * dimensions
    if len(raw) < begin:
        raise DataError(f"{path}: ends within its header of {begin} bytes")
    shape = tuple(int(n) for n in np.frombuffer(raw, ">u4", dimensions, offset=4))
    expected = math.prod(shape) * kind.itemsize
    if len(raw) - begin != expected:
        raise DataError(f"{path}: holds {len(raw) - begin} bytes of data, its header {shape} announces {expected}")
    return np.frombuffer(raw, kind, offset=begin).reshape(shape).astype(kind.newbyteorder("="))
