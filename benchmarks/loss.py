"""Seconds and memory of the next-token loss, forward and backward, against other ways to compute it in PyTorch.

The contenders take turns on the same hidden states, head and labels: whole logits with F.cross_entropy, torch's own
chunked F.linear_cross_entropy (where this torch has it), and chunks whose logits are computed again in the backward
pass. On a CPU all is float32; on a GPU products are in bfloat16, by autocast, as a training run has them. Memory is
the largest sum of bytes of all tensors that are alive at once beside the inputs: on a GPU what its allocator counted,
on a CPU what operations made (not followed inside F.linear_cross_entropy, which is a single operation).

    resilin bench run loss --help
"""

from __future__ import annotations

import argparse
import os
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from resilin.bench.results import Report, Row, results_name
from resilin.objective.cross_entropy import CrossEntropyTerms, chunk_rows, chunked_cross_entropy

# tokens, vocabulary, hidden size
SHAPES = {
    "cpu": [(2048, 4096, 256), (1024, 8192, 512), (1024, 32768, 512)],
    "cuda": [(32768, 32000, 768), (16384, 32000, 2048), (8192, 128256, 4096)],
}
OURS = "Resilin"
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def ours(hidden: Tensor, head: Tensor, labels: Tensor) -> Tensor:
    return chunked_cross_entropy(hidden, head, labels, None, CrossEntropyTerms()).loss


def whole(hidden: Tensor, head: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(hidden @ head.T, labels, reduction="sum")


def library(hidden: Tensor, head: Tensor, labels: Tensor) -> Tensor:
    options = torch.nn.LinearCrossEntropyOptions()
    return F.linear_cross_entropy(hidden, head, labels, reduction="sum", options=options)


def recomputed(hidden: Tensor, head: Tensor, labels: Tensor) -> Tensor:
    rows = chunk_rows(len(head), hidden.device.type)
    parts = zip(hidden.split(rows), labels.split(rows), strict=True)
    total = torch.zeros((), device=hidden.device)
    for x, y in parts:
        total = total + checkpoint(whole, x, head, y, use_reentrant=False)
    return total


def contenders() -> dict[str, Loss]:
    found: dict[str, Loss] = {OURS: ours, "F.cross_entropy on whole logits": whole}
    if hasattr(F, "linear_cross_entropy"):
        found["F.linear_cross_entropy, chunked"] = library
    found["chunks recomputed in the backward pass"] = recomputed
    return found


class Alive(TorchDispatchMode):
    """Follows the bytes of all tensors that operations make."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known: set[int] = set()

    def _forget(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {x.untyped_storage()._cdata for x in args if isinstance(x, Tensor)}
        out = func(*args, **(kwargs or {}))
        for item in out if isinstance(out, tuple | list) else (out,):
            if not isinstance(item, Tensor):
                continue
            storage = item.untyped_storage()
            if storage._cdata in given or storage._cdata in self.known:
                continue
            self.known.add(storage._cdata)
            self.now += storage.nbytes()
            weakref.finalize(storage, self._forget, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return out


def take(loss: Loss, hidden: Tensor, head: Tensor, labels: Tensor) -> None:
    hidden.grad = head.grad = None
    with torch.autocast(hidden.device.type, torch.bfloat16, enabled=hidden.is_cuda):
        total = loss(hidden, head, labels)
    total.backward()


def seconds(loss: Loss, *inputs: Tensor) -> float:
    if inputs[0].is_cuda:
        torch.cuda.synchronize()
    began = time.perf_counter()
    take(loss, *inputs)
    if inputs[0].is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - began


def peak_bytes(loss: Loss, *inputs: Tensor) -> int:
    if inputs[0].is_cuda:
        inputs[0].grad = inputs[1].grad = None
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        take(loss, *inputs)
        return torch.cuda.max_memory_allocated() - before
    with Alive() as alive:
        take(loss, *inputs)
    return alive.peak


def measure(shape: tuple[int, int, int], rounds: int, device: str) -> list[Row]:
    tokens, vocabulary, size = shape
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, size, generator=g).to(device).requires_grad_()
    head = (torch.randn(vocabulary, size, generator=g) / size**0.5).to(device).requires_grad_()
    inputs = (hidden, head, torch.randint(vocabulary, (tokens,), generator=g).to(device))
    everyone = contenders()
    times: dict[str, list[float]] = {name: [] for name in everyone}
    for index in range(rounds + 1):
        for name, loss in everyone.items():
            taken = seconds(loss, *inputs)
            if index:  # the first round warms up
                times[name].append(taken * 1e3)
    # On a CPU the library's chunks live inside one operation, where they cannot be followed.
    followed = {name: loss for name, loss in everyone.items() if device == "cuda" or loss is not library}
    memory = {name: peak_bytes(loss, *inputs) / 2**20 for name, loss in followed.items()}
    label = f"{tokens} tokens, vocabulary {vocabulary}, hidden size {size}"
    rows = []
    for name in list(everyone)[1:]:
        rows.append(Row.from_turns(label, "ms", times[OURS], times[name], name, better="lower"))
        if name not in memory:
            continue
        rows.append(
            Row(
                name=f"{label}, peak memory",
                unit="MiB",
                ours=memory[OURS],
                peer=memory[name],
                peer_name=name,
                better="lower",
                note=f"the head's gradient alone is {vocabulary * size / 2**18:.0f} MiB",
            )
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--name", help="the results file; default: loss, loss-cuda on a GPU")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = [row for shape in SHAPES[args.device] for row in measure(shape, args.rounds, args.device)]
    for row in rows:
        print(f"{row.name}: {row.ours:.1f} {row.unit}, {row.peer_name} {row.peer:.1f} {row.unit} ({row.ratio:.2f}x)")
    dtype = "bf16 by autocast" if args.device == "cuda" else "fp32"
    settings = {"rounds": args.rounds, "device": args.device, "threads": args.threads, "dtype": dtype}
    name = args.name or results_name("loss", args.device)
    print(f"wrote {Report.of(name, settings, rows).write(args.output)}")


if __name__ == "__main__":
    main()
