"""Four tasks of unequal size share a mixture of experts; devices are processes, allotted one each or as it pays.

    python examples/unequal_tasks/train.py --devices 4     # one device for each task: three of them wait
    python examples/unequal_tasks/train.py --devices 8     # four, two, one and one

Every task has a head and samples of its own: ten noisy patterns, whose classes each task numbers in another way.
Gradients are sums over the same samples for any allotment, so the losses of both commands agree. What is printed as
measured is processor time, which does not depend on how many cores there are.
"""

from __future__ import annotations

import argparse
import tempfile
import time

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor, nn

from resilin.models.decoder_settings import DecoderSettings, MoESettings
from resilin.models.initial import fill_parameters
from resilin.models.moe import MoE
from resilin.parallel.group import Group
from resilin.parallel.task_allocation import TaskAllocator
from resilin.parallel.task_groups import TaskGroups

HIDDEN, CLASSES, TOKENS = 64, 10, 16


class Shared(nn.Module):
    """Two layers of experts that all tasks use, and a head for each task."""

    def __init__(self, tasks: int) -> None:
        super().__init__()
        moe = MoESettings(experts=8, experts_per_token=2, expert_size=128)
        settings = DecoderSettings(hidden_size=HIDDEN, heads=2, moe=moe, init="fan_in")
        self.trunk = nn.ModuleList(MoE(settings, moe) for _ in range(2))
        fill_parameters(self.trunk, settings, 0)
        generator = torch.Generator().manual_seed(0)
        self.heads = nn.ParameterList(
            nn.Parameter(torch.randn(CLASSES, HIDDEN, generator=generator) / HIDDEN**0.5) for _ in range(tasks)
        )

    def forward(self, x_BTD: Tensor, task: int) -> Tensor:
        """(B, T, D) -> (B, classes) logits of a task."""
        for layer in self.trunk:
            x_BTD = x_BTD + layer(x_BTD)[0]
        return x_BTD.mean(1) @ self.heads[task].T


def batch(task: int, step: int, samples: int) -> tuple[Tensor, Tensor]:
    """(B, T, D) noisy patterns and (B,) classes of a task's samples of a step."""
    patterns = torch.randn(CLASSES, TOKENS, HIDDEN, generator=torch.Generator().manual_seed(99))
    order = torch.randperm(CLASSES, generator=torch.Generator().manual_seed(task))
    generator = torch.Generator().manual_seed(1 + step * 1000 + task)
    seen = torch.randint(CLASSES, (samples,), generator=generator)
    return patterns[seen] + torch.randn(samples, TOKENS, HIDDEN, generator=generator), order[seen]


def work(rank: int, samples: list[int], devices: int, steps: int, meeting: str) -> None:
    """One device."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=devices)
    allocator = TaskAllocator(tuple(samples), devices, devices)
    groups = TaskGroups(allocator.current, Group.of())
    model = Shared(len(samples))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    busy = torch.zeros(devices, dtype=torch.float64)
    for step in range(steps):
        losses, took = torch.zeros(len(samples)), torch.zeros(len(samples), dtype=torch.float64)
        for task in groups.tasks:
            mine = groups.share(task, samples[task])
            x, y = batch(task, step, samples[task])
            began = time.thread_time()
            loss = F.cross_entropy(model(x[mine.start : mine.stop], task), y[mine.start : mine.stop], reduction="sum")
            loss.backward()
            took[task] = time.thread_time() - began
            losses[task] = loss.detach()
        busy[rank] += took.sum()
        heads = {task: [head] for task, head in enumerate(model.heads)}
        groups.sum_gradients(list(model.trunk.parameters()), heads, sum(samples))
        optimizer.step()
        optimizer.zero_grad()
        dist.all_reduce(took)
        allocator.observe(took.tolist())
        if step % 10 == 0 or step == steps - 1:
            dist.all_reduce(losses)
            if rank == 0:
                words = "  ".join(f"{loss / count:.4f}" for loss, count in zip(losses.tolist(), samples, strict=True))
                print(f"step {step:3}  losses {words}", flush=True)  # noqa: T201
    dist.all_reduce(busy)
    if rank == 0:
        plan = allocator.current
        print(f"devices of each task: {[len(own) for own in plan.devices]}")  # noqa: T201
        print(f"utilisation: {plan.utilisation(samples):.2f} by samples, ", end="")  # noqa: T201
        print(f"{float(busy.sum() / (devices * busy.max())):.2f} measured")  # noqa: T201
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    """Start the devices."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, nargs="+", default=[64, 32, 16, 16], help="of each task in a step")
    parser.add_argument("--devices", type=int, default=8)
    parser.add_argument("--steps", type=int, default=21)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(work, (args.samples, args.devices, args.steps, f"{folder}/meeting"), nprocs=args.devices)


if __name__ == "__main__":
    main()
