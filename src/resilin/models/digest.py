"""Which weights a model has, in a few letters."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import nn

from resilin.nouns import Deferred


def weights_digest(model: nn.Module) -> str:
    """A hash of all parameters and buffers, by name."""
    digest = hashlib.blake2b(digest_size=16)
    for name, held in sorted(model.state_dict().items()):
        tensor: Any = held.read() if isinstance(held, Deferred) else held
        digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)}:".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
