"""What a decision depended on, as a short hash: a stored decision is used again only where all of it is the same."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

_WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_CHUNK = 2**24
_PERIOD = 65_521  # a prime: places within it weigh differently


def _sums(tensor: Tensor) -> Tensor:
    """(2,) int64: the sum of the tensor's bit patterns, and their sum weighted by place. Exact, on its own device."""
    raw = tensor.detach().contiguous().view(torch.uint8) if tensor.dtype == torch.bool else tensor.detach().contiguous()
    words = raw.view(_WORDS[raw.element_size()]).flatten()
    total = torch.zeros(2, dtype=torch.int64, device=words.device)
    for start in range(0, len(words), _CHUNK):
        part = words[start : start + _CHUNK].long()
        places = torch.arange(start, start + len(part), device=words.device) % _PERIOD + 1
        total += torch.stack((part.sum(), (part * places).sum()))
    return total


def _leaves(tree: Any, path: str) -> Iterator[tuple[str, Any]]:
    if isinstance(tree, dict):
        for key in tree:
            yield from _leaves(tree[key], f"{path}/{key}")
    elif isinstance(tree, list | tuple):
        for number, item in enumerate(tree):
            yield from _leaves(item, f"{path}/{number}")
    else:
        yield path, tree


def fingerprint(*trees: Any) -> str:
    """16 hexadecimal digits of some states, settings and numbers; tensors by every bit."""
    digest = hashlib.sha256()
    for number, tree in enumerate(trees):
        for path, leaf in _leaves(tree, str(number)):
            if isinstance(leaf, Tensor):
                value = json.dumps([str(leaf.dtype), list(leaf.shape), _sums(leaf.reshape(-1)).tolist()])
            else:
                value = json.dumps(leaf, default=str)
            digest.update(f"{path}={value}\n".encode())
    return digest.hexdigest()[:16]
