"""How a training process keeps the memory it frees.

By default glibc gives freed memory back to the system as soon as 64 MiB of it lie at the end of the heap, which is
what a training step frees again and again; each page is then cleared and mapped anew in the next step, 2% to 4% of a
CPU step's time. A step asks for the same sizes as the one before, so keeping them costs next to no memory.
"""

from __future__ import annotations

import ctypes
import sys

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # malloc.h
_LARGE = 1 << 25
"""Larger tensors are mapped and unmapped one by one: the most that older glibc allows, and what newer ones adapt to."""


def keep_freed_memory() -> bool:
    """Tell malloc to reuse freed blocks rather than return them; says whether it obeyed (only glibc does)."""
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(_MMAP_THRESHOLD, _LARGE) and mallopt(_TRIM_THRESHOLD, 2**31 - 1))
