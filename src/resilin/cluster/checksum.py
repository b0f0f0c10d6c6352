"""A 64-bit checksum of bytes, compared whenever states travel (ElasWave, section 7): XXH3, as fast as memory.

It guards against damage, not against forgery.
"""

from __future__ import annotations

from typing import Any

import torch
import xxhash
from torch import Tensor


def checksum(data: Tensor) -> int:
    """Of the bytes of a contiguous tensor in host memory."""
    raw: Any = data.detach().reshape(-1).view(torch.uint8).numpy()
    return int(xxhash.xxh3_64_intdigest(raw))


class RunningSum:
    """`checksum` of a tensor of bytes, a stretch of it at a time.

    Args:
        data: (bytes,) uint8, in host memory.
    """

    def __init__(self, data: Tensor) -> None:
        self._raw: Any = data.numpy()
        self._sum, self._at = xxhash.xxh3_64(), 0

    def up_to(self, end: int) -> int:
        """The sum of the bytes before `end`, which is no less than that of the last call."""
        self._sum.update(self._raw[self._at : end])
        self._at = end
        return int(self._sum.intdigest())
