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
