"""Freed memory is kept, where the C library can."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

SCRIPT = """
import ctypes, resource
from resilin.run.allocator import keep_freed_memory
obeyed = keep_freed_memory() if {keep} else None
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
def step():
    blocks = [libc.malloc(16 << 20) for _ in range(12)]
    for block in blocks:
        ctypes.memset(block, 1, 16 << 20)
    for block in blocks:
        libc.free(block)
step(), step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
step(), step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before, obeyed)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has this setting")
def test_large_blocks_are_reused_instead_of_mapped_anew() -> None:
    def faults(keep: bool) -> tuple[int, str]:
        script = SCRIPT.format(keep=keep)
        out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split()
        return int(out[0]), out[1]

    kept, obeyed = faults(keep=True)
    assert obeyed == "True"
    assert kept * 10 < faults(keep=False)[0]
