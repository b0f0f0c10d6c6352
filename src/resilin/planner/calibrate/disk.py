"""How quickly a folder's disk takes and gives bytes."""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from pathlib import Path

_PART = 8 << 20


def measure_disk(folder: Path, count: int = 128 << 20, rounds: int = 3) -> tuple[float, float]:
    """(read, written) bytes a second, each the median over rounds; what is written is on the disk, and read from it.

    Where the system does not drop a file from its cache when asked, reading is that of the cache.

    Args:
        folder: on the disk.
        count: bytes of a round.
        rounds: how many.
    """
    data = os.urandom(_PART)
    read, written = [], []
    for _ in range(rounds):
        with tempfile.NamedTemporaryFile(dir=folder) as file:
            began = time.perf_counter()
            for _ in range(count // _PART):
                file.write(data)
            file.flush()
            os.fsync(file.fileno())
            written.append(count / (time.perf_counter() - began))
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            file.seek(0)
            began = time.perf_counter()
            while file.read(_PART):
                pass
            read.append(count / (time.perf_counter() - began))
    return statistics.median(read), statistics.median(written)
