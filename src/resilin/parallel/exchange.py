"""Sending tensors around a group: the two patterns that ZeRO needs, over whichever way the backend is fast at."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from resilin.parallel.activity import waiting
from resilin.parallel.group import Group

Wait = Callable[[], object]


def _done() -> None:
    return None


def swap(
    received: Tensor, sent: Tensor, received_sizes: Sequence[int], sent_sizes: Sequence[int], group: Group
) -> Wait:
    """Every rank sends a part of `sent` to every rank; gives what waits until `received` has all of theirs.

    Args:
        received: (sum of received_sizes,), by sender.
        sent: (sum of sent_sizes,), by receiver; must not change before the wait.
        received_sizes: elements from each rank of the group.
        sent_sizes: elements for each.
        group: all of its ranks call together.
    """
    if group.size == 1:
        received.copy_(sent)
        return _done
    # gloo takes three times as long for a reduce-scatter of the same bytes, and adds them in an order of its own.
    work = dist.all_to_all_single(
        received, sent, list(received_sizes), list(sent_sizes), group=group.process_group, async_op=True
    )

    def wait() -> None:
        with waiting(group.ranks, "exchanging gradients"):
            group.wait(work)

    return wait


def share(parts: Sequence[Tensor], group: Group) -> Wait:
    """Every rank gives its part to all: `parts[group.index]` is sent, the others are filled.

    Args:
        parts: one for each rank of the group, contiguous, of any sizes.
        group: all of its ranks call together.

    Returns:
        What waits until they are filled.
    """
    if group.size == 1:
        return _done
    # A broadcast each takes gloo half the time of its all-gather, and needs no common size.
    works = [
        dist.broadcast(part, group=group.process_group, group_src=index, async_op=True)
        for index, part in enumerate(parts)
        if part.numel()
    ]

    def wait() -> None:
        with waiting(group.ranks, "exchanging weights"):
            for work in works:
                group.wait(work)

    return wait


def add_up(tensor: Tensor, group: Group) -> Tensor:
    """The sum over a group, in place."""
    if group.size > 1:
        with waiting(group.ranks):
            group.wait(dist.all_reduce(tensor, group=group.process_group, async_op=True))
    return tensor


def largest(tensor: Tensor, group: Group) -> Tensor:
    """The largest of a group's, in place."""
    if group.size > 1:
        group.wait(dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=group.process_group, async_op=True))
    return tensor


def add_up_all(
    tensors: Sequence[Tensor], group: Group, bucket_bytes: int = 25 << 20, *, in_order: bool = False
) -> None:
    """The sums of many tensors over a group, in place, a bucket of them at a time.

    Args:
        tensors: of one shape each at all ranks.
        group: the ranks.
        bucket_bytes: of what travels together.
        in_order: whether every element is the sum in the order of ranks, wherever it lies in its bucket.
    """
    if group.size == 1:
        return
    pending: list[Tensor] = []
    size = 0
    for tensor in tensors:
        if pending and (tensor.dtype != pending[0].dtype or size + tensor.nbytes > bucket_bytes):
            _add_up_bucket(pending, group, in_order)
            pending, size = [], 0
        pending.append(tensor)
        size += tensor.nbytes
    _add_up_bucket(pending, group, in_order)


def _add_up_bucket(tensors: Sequence[Tensor], group: Group, in_order: bool) -> None:
    add = _add_up_in_order if in_order and group.size > 2 else add_up  # of two, one order is the other
    if len(tensors) == 1 and tensors[0].is_contiguous():
        add(tensors[0], group)
    elif tensors:
        flat = add(torch.cat([tensor.reshape(-1) for tensor in tensors]), group)
        parts = flat.split([tensor.numel() for tensor in tensors])
        torch._foreach_copy_(list(tensors), [p.view(t.shape) for p, t in zip(parts, tensors, strict=True)])


def _add_up_in_order(tensor: Tensor, group: Group) -> Tensor:
    parts = [tensor if rank == group.index else torch.empty_like(tensor) for rank in range(group.size)]
    share(parts, group)()
    total = parts[0].clone()
    for part in parts[1:]:
        total += part
    return tensor.copy_(total)
