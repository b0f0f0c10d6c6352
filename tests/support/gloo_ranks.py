"""Ranks as real processes over gloo."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist


def connected(rank: int, world: int, meeting: str, work: Callable[..., None], *arguments: object) -> None:
    """Run `work(rank, *arguments)` as one of `world` processes; for `torch.multiprocessing.spawn`."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=world)
    try:
        work(rank, *arguments)
        dist.barrier()
    finally:
        dist.destroy_process_group()
