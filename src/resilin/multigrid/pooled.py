"""Mean and variance of a batch that lies on several processes.

Legend: N samples of this process, C channels, R processes.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class _Gathered(torch.autograd.Function):
    """Everybody's copy of a tensor, in the order of ranks: (...) -> (R, ...)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, x.contiguous(), group=group)
        return torch.stack(parts)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        # The loss is the sum over processes: what each of them made of this copy adds up.
        whole = grads[0].clone()
        dist.all_reduce(whole, group=ctx.group)
        return whole[dist.get_rank(ctx.group)], None


def pooled_moments(x: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, Tensor, float]:
    """Mean and biased variance (C,) over the samples of all processes of a group, and how many values they come from.

    Processes may have different numbers of samples. They exchange one small message, and the same in the backward
    pass, in which every process of the group has to take part.

    Args:
        x: (N, C, ...) of this process.
        group: the processes.
    """
    axes = [0, *range(2, x.ndim)]
    dtype = torch.promote_types(x.dtype, torch.float32)
    variance, mean = torch.var_mean(x.to(dtype), axes, correction=0)
    count = x.numel() / x.shape[1]
    # In double precision the square of the mean may be taken away again without harm.
    mean, variance = mean.double(), variance.double()
    parts_R = _Gathered.apply(torch.cat((mean, variance + mean.square(), mean.new_tensor([count]))), group)
    shares_R1 = parts_R[:, -1:].detach() / parts_R[:, -1].detach().sum()
    mean, square = (parts_R[:, :-1] * shares_R1).sum(0).chunk(2)
    total = float(parts_R[:, -1].sum())
    return mean.to(dtype), (square - mean.square()).clamp(min=0).to(dtype), total


@torch.no_grad()
def pool_running(norm: Any) -> None:
    """Replace the running statistics of a `SubBatchNorm` by their mean over all processes, as for splits."""
    mean, variance = norm.merged()
    parts_R = torch.stack((mean, variance + mean.square())).double()
    dist.all_reduce(parts_R)
    mean, square = parts_R / dist.get_world_size()
    norm.running_mean.copy_(mean)
    norm.running_var.copy_(square - mean.square())


def pool_size(wanted: int, world: int) -> int:
    """How many processes pool their statistics: the most that divide `world` and are at most `wanted`."""
    return max(size for size in range(1, max(1, min(wanted, world)) + 1) if world % size == 0)


_groups: dict[int, dist.ProcessGroup] = {}


def pool_of(size: int) -> dist.ProcessGroup | None:
    """This process and its neighbours by rank, `size` together; None for one alone.

    A group is made once for as long as the world lasts. All processes have to ask for the same sizes in the same order.
    """
    if size == 1:
        return None
    if size == dist.get_world_size():
        return dist.group.WORLD
    found = _groups.get(size)
    try:
        ranks = dist.get_process_group_ranks(found) if found is not None else []
    except KeyError:  # that world is gone, and its groups with it
        ranks = []
    if dist.get_rank() not in ranks:
        everybody = list(range(dist.get_world_size()))
        made = [dist.new_group(everybody[start : start + size]) for start in everybody[::size]]
        found = _groups[size] = made[dist.get_rank() // size]
    return found


def processes() -> tuple[int, int]:
    """This process's rank and how many there are; (0, 1) where training is not distributed."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1
