"""A 64-bit sum of bytes that depends on where they stand: compared whenever states travel (ElasWave, section 7).

Every 8-byte word is multiplied by an odd number of its place, modulo 2**64. One changed word always changes the sum,
and words that changed places do but for one case in 2**64. It runs at the speed of memory, and guards against damage,
not against forgery.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

_BLOCK = 1 << 14  # words; their multipliers stay in a core's cache

Words = NDArray[np.uint64]


@cache
def _odd(count: int, seed: int) -> Words:
    drawn: Words = np.random.Generator(np.random.PCG64(seed)).integers(0, 1 << 64, count, dtype=np.uint64)
    return drawn | np.uint64(1)


def sum64(data: Tensor | NDArray[Any]) -> int:
    """The sum of the bytes of a contiguous tensor in host memory, or array, and of their number."""
    array: NDArray[Any] = data.numpy() if isinstance(data, Tensor) else data
    raw = array.reshape(-1).view(np.uint8)
    whole = len(raw) // 8
    words = raw[: whole * 8].view(np.uint64)
    sums = np.zeros(whole // _BLOCK + 2, dtype=np.uint64)
    blocks = whole // _BLOCK
    if blocks:
        sums[:blocks] = words[: blocks * _BLOCK].reshape(blocks, _BLOCK) @ _odd(_BLOCK, 1)
    rest = words[blocks * _BLOCK :]
    if len(rest):
        sums[blocks] = rest @ _odd(_BLOCK, 1)[: len(rest)]
    tail = np.zeros(8, dtype=np.uint8)
    tail[: len(raw) - whole * 8] = raw[whole * 8 :]
    sums[blocks + 1] = tail.view(np.uint64)[0]
    seeds = _odd(1 << (len(sums) - 1).bit_length(), 2)[: len(sums)]
    total = int(sums @ seeds) + len(raw) * 0x9E3779B97F4A7C15
    return total & 0xFFFFFFFFFFFFFFFF
