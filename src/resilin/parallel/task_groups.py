"""Gradients of several tasks that share a part of a model, on devices that were allotted to them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from resilin.parallel.errors import ParallelError
from resilin.parallel.exchange import add_up_all
from resilin.parallel.group import Group, make_groups
from resilin.parallel.task_allocation import Allocation


class TaskGroups:
    """The ranks that compute each task; made by all ranks together, and anew for another allocation.

    Args:
        allocation: of devices, which are the ranks.
        everyone: all ranks.

    Raises:
        ParallelError: the allocation is for another number of ranks.
    """

    def __init__(self, allocation: Allocation, everyone: Group) -> None:
        if allocation.size != everyone.size:
            raise ParallelError(f"an allocation of {allocation.size} devices is given {everyone.size} ranks")
        self.allocation, self.everyone = allocation, everyone
        self.tasks = [task for task, own in enumerate(allocation.devices) if everyone.index in own]
        members = list(dict.fromkeys(allocation.devices))
        idle = [(rank,) for rank in range(everyone.size) if not any(rank in own for own in members)]
        self.own = make_groups([*members, *idle], everyone.index, "task")

    def share(self, task: int, samples: int) -> range:
        """The samples of a task that this rank computes."""
        return self.allocation.share(task, self.everyone.index, samples)

    def sum_gradients(
        self, shared: Sequence[nn.Parameter], heads: Mapping[int, Sequence[nn.Parameter]], units: float
    ) -> None:
        """Sum gradients, and divide them once by the number of units of all tasks; all ranks call together.

        So a gradient does not depend on the allocation: it is the sum over the same samples.

        Args:
            shared: parameters that all tasks use: summed over all ranks.
            heads: parameters of each task: summed over the ranks that compute it. Others' have no gradient.
            units: of the whole step, over all tasks.
        """
        for parameter in shared:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        add_up_all([p.grad for p in shared if p.grad is not None], self.everyone)
        for task, parameters in sorted(heads.items()):
            if task not in self.tasks:
                for parameter in parameters:
                    parameter.grad = None
                continue
            for parameter in parameters:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
            add_up_all([p.grad for p in parameters if p.grad is not None], self.own)
        for parameter in [*shared, *(p for own in heads.values() for p in own)]:
            if parameter.grad is not None:
                parameter.grad.div_(units)
