"""Small values that all ranks of a group tell each other, as JSON: nothing is pickled."""

from __future__ import annotations

import json
from typing import Any

import torch

from resilin.parallel.activity import waiting
from resilin.parallel.exchange import gathered
from resilin.parallel.group import Group


def tell_all(value: Any, group: Group) -> list[Any]:
    """What every rank gave, by index in the group."""
    if group.size == 1:
        return [value]
    raw = json.dumps(value).encode()
    if group.near is not None:
        with waiting(group.ranks):
            return [json.loads(text) for text in group.near.tell(raw)]
    device = _device_of(group)
    counts: list[int] = gathered(torch.tensor([len(raw)], device=device), 0, group).tolist()
    mine = torch.zeros(max(counts), dtype=torch.uint8, device=device)
    mine[: len(raw)] = torch.frombuffer(bytearray(raw), dtype=torch.uint8)
    texts = gathered(mine[None], 0, group)
    return [json.loads(text[:count].cpu().numpy().tobytes()) for text, count in zip(texts, counts, strict=True)]


def _device_of(group: Group) -> torch.device:
    on_gpu = group.backend == "nccl"
    return torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
