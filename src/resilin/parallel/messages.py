"""Small values that all ranks of a group tell each other, as JSON: nothing is pickled."""

from __future__ import annotations

import json
from typing import Any

import torch
import torch.distributed as dist

from resilin.parallel.activity import waiting
from resilin.parallel.group import Group


def tell_all(value: Any, group: Group) -> list[Any]:
    """What every rank gave, by index in the group."""
    if group.size == 1:
        return [value]
    raw = json.dumps(value).encode()
    device = _device_of(group)
    lengths = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(group.size)]
    with waiting(group.ranks):
        mine = torch.tensor([len(raw)], device=device)
        group.wait(dist.all_gather(lengths, mine, group=group.process_group, async_op=True))
    counts = [int(length) for length in lengths]
    mine = torch.zeros(max(counts), dtype=torch.uint8, device=device)
    mine[: len(raw)] = torch.frombuffer(bytearray(raw), dtype=torch.uint8)
    texts = [torch.empty_like(mine) for _ in counts]
    with waiting(group.ranks):
        group.wait(dist.all_gather(texts, mine, group=group.process_group, async_op=True))
    return [json.loads(text[:count].cpu().numpy().tobytes()) for text, count in zip(texts, counts, strict=True)]


def _device_of(group: Group) -> torch.device:
    on_gpu = group.backend == "nccl"
    return torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
