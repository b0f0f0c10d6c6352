"""Where a run computes, and with how many threads."""

from __future__ import annotations

import os
from typing import Literal

import torch

from resilin.cluster.position import local_number, share_of_cores


def choose_device(wanted: Literal["auto", "cpu", "cuda"]) -> torch.device:
    """The device of this process; `auto` takes a GPU where there is one."""
    if wanted == "cuda" and not torch.cuda.is_available():
        raise ValueError("train.device = 'cuda', but torch sees no GPU here; use 'auto' or 'cpu'")
    if wanted != "cpu" and torch.cuda.is_available():
        number = local_number()
        if "LOCAL_RANK" not in os.environ:  # Slurm may show each task no GPUs but its own, numbered from 0
            number %= torch.cuda.device_count()
        return torch.device("cuda", number)
    return torch.device("cpu")


def set_threads(threads: int) -> int:
    """Use this many CPU threads (0: its share of the cores, where workers share a machine); returns the number."""
    chosen = threads or share_of_cores(len(os.sched_getaffinity(0)))
    torch.set_num_threads(chosen)
    return chosen


def device_in_words(device: torch.device) -> str:
    """For people: "cpu, 2 threads" or the GPU's name."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu, {torch.get_num_threads()} threads"
