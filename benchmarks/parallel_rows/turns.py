"""Contenders in turns within the same processes, and the rows made of their times."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from resilin.bench.results import Row

Step = Callable[[int], object]


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """How long the slowest worker takes; all begin together."""
    dist.barrier()
    began = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    taken = torch.tensor([time.perf_counter() - began], dtype=torch.float64, device=device)
    dist.all_reduce(taken, op=dist.ReduceOp.MAX)
    return float(taken)


def in_turns(
    contenders: Mapping[str, Step],
    rounds: int,
    device: torch.device,
    *,
    prepare: Step = lambda _: None,
    warm: int = 2,
    label: str = "",
) -> dict[str, list[float]]:
    """Seconds of every step of every contender, who take turns; each round begins with another one."""
    names = list(contenders)
    times: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds + warm):
        prepare(turn)
        for place in range(len(names)):
            name = names[(place + turn) % len(names)]
            taken = seconds(partial(contenders[name], turn), device)
            if turn >= warm:
                times[name].append(taken)
    if dist.get_rank() == 0:
        told = ", ".join(f"{name} {1e3 * statistics.median(each):.1f}" for name, each in times.items())
        print(f"{label} ms: {told}", file=sys.stderr, flush=True)
    return times


def row(name: str, ours: Sequence[float], peer: Sequence[float], peer_name: str, target: float, **more: Any) -> Row:
    """A row of times, with the median and the quarters of the ratios within each round in its note."""
    ratios = sorted(theirs / mine for mine, theirs in zip(ours, peer, strict=True))
    low, middle, high = statistics.quantiles(ratios, n=4)
    note = f"ratio within a round: median {middle:.2f}, quarters {low:.2f} to {high:.2f}, {len(ratios)} rounds"
    more["note"] = "; ".join(filter(None, [note, more.get("note", "")]))
    return Row.from_turns(name, "s", list(ours), list(peer), peer_name, better="lower", target=target, **more)
