"""How quickly processes of this machine exchange tensors, as runs do: sums and messages of several sizes.

Sums are taken between products, as in a run: one that follows another finds everyone awake, and is several times as
quick as one for which the others have to be waited for, and woken.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

SIZES = (1 << 12, 1 << 18, 1 << 22, 1 << 24)
"""Bytes that are summed and sent."""
_ROUNDS = 7
_BETWEEN = 5
"""Sums of a round, each behind some products."""
_PRODUCTS, _SIDE = 4, 256
_LEAST = 1e-6  # seconds: what was measured cannot be less than nothing


@dataclass(frozen=True, slots=True)
class Exchanged:
    """What was measured between so many processes.

    Attributes:
        processes: that exchanged.
        sums: seconds of an all-reduce by bytes.
        messages: seconds of a message to a neighbour by bytes.
    """

    processes: int
    sums: dict[int, float]
    messages: dict[int, float]

    def line(self) -> tuple[float, float]:
        """(bytes a second that each process sends, seconds of a step) of the ring that explains the sums best.

        An all-reduce of S bytes among n has 2 (n - 1) steps, in which each process sends 2 (n - 1) / n S bytes; of all
        sizes, relative errors count.
        """
        n = self.processes
        rows = np.array([[2 * (n - 1) / n * size, 2 * (n - 1)] for size in self.sums])
        taken = np.array(list(self.sums.values()))
        weighted = rows / taken[:, None]
        per_byte, per_step = np.linalg.lstsq(weighted, np.ones(len(taken)), rcond=None)[0]
        largest = max(self.sums)
        if per_byte <= 0:  # too noisy for a line: what the largest sum says
            per_byte = self.sums[largest] / (2 * (n - 1) / n * largest)
        return 1 / float(per_byte), max(float(per_step), 0.0)


def _rank(rank: int, count: int, folder: str, sizes: Sequence[int]) -> None:
    import torch
    import torch.distributed as dist

    from resilin.cluster.scheduling import compute_on
    from resilin.parallel.exchange import add_up, ask, post
    from resilin.parallel.group import of_all
    from resilin.parallel.messages import tell_all

    torch.set_num_threads(1)
    compute_on()
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    where = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=where, rank=rank, world_size=count)
    group = of_all()
    found: dict[str, dict[int, float]] = {"sums": {}, "messages": {}}
    left, right = torch.randn(_SIDE, _SIDE), torch.randn(_SIDE, 2 * _SIDE)
    for size in sizes:
        data, other = torch.ones(size // 4), torch.empty(size // 4)
        ahead, behind = (rank + 1) % count, (rank - 1) % count

        def message(data: torch.Tensor = data, other: torch.Tensor = other, to: int = ahead, by: int = behind) -> None:
            sent = post(data, to, 0, group)
            ask(other, by, 0, group)()
            if sent is not None:
                group.wait_message(sent)

        alone: list[float] = []
        summed: list[float] = []
        messages: list[float] = []
        for _ in range(_ROUNDS):
            for taken, exchange in ((alone, False), (summed, True)):
                dist.barrier()
                began = time.perf_counter()
                for _ in range(_BETWEEN):
                    for _ in range(_PRODUCTS):
                        torch.mm(left, right)
                    if exchange:
                        add_up(data, group)
                taken.append((time.perf_counter() - began) / _BETWEEN)
                data.fill_(1.0)
            dist.barrier()
            began = time.perf_counter()
            message()
            messages.append(time.perf_counter() - began)
        compute, both = statistics.median(alone[1:]), statistics.median(summed[1:])
        found["sums"][size] = max(both - compute, _LEAST)
        found["messages"][size] = statistics.median(messages[1:])
    told = tell_all([[found[kind][size] for size in sizes] for kind in found], group)
    if rank == 0:
        slowest = np.array(told).max(axis=0).tolist()
        whole = {
            kind: dict(zip(map(str, sizes), taken, strict=True)) for kind, taken in zip(found, slowest, strict=True)
        }
        (Path(folder) / "found.json").write_text(json.dumps(whole), encoding="utf-8")
    dist.destroy_process_group()


def measure_links(processes: int, sizes: Sequence[int] = SIZES, timeout: float = 120.0) -> Exchanged:
    """Times sums and messages between so many new processes of one thread.

    Raises:
        RuntimeError: one of them failed, or they took too long.
    """
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        started = [context.Process(target=_rank, args=(rank, processes, folder, sizes)) for rank in range(processes)]
        for one in started:
            one.start()
        ends = time.monotonic() + timeout
        for one in started:
            one.join(max(ends - time.monotonic(), 0.1))
        late = [one for one in started if one.is_alive()]
        for one in late:
            one.kill()
        file = Path(folder) / "found.json"
        if late or not file.exists():
            why = f"took more than {timeout:.0f} s" if late else "ended without a result"
            raise RuntimeError(f"the processes that measured links {why}")
        whole = json.loads(file.read_text(encoding="utf-8"))
    return Exchanged(
        processes, *({int(size): taken for size, taken in whole[kind].items()} for kind in ("sums", "messages"))
    )
