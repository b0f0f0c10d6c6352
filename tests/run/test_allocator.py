"""Freed memory is kept, where the C library can."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

SCRIPT = """
import resource
from resilin.run.allocator import keep_freed_memory
obeyed = keep_freed_memory() if {keep} else None
import torch
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def step():
    [torch.ones(1 << 20) for _ in range(64)]  # 64 tensors of 4 MiB, freed together as a step frees its activations
for _ in range(10):
    step()
before = faults()
for _ in range(10):
    step()
print(faults() - before, obeyed)
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
