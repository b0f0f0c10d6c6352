"""What ranks of a group do together: each pattern the quickest way there is between them.

On the CPUs of one machine that is memory which all of them see (`resilin.parallel.neighbours`); else the way that the
group's backend is fast at.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from resilin.parallel.activity import waiting
from resilin.parallel.group import Group

# Renamed in torch 2.13, whose predecessors the project also takes.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

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
    if group.near is not None:
        return _waiting(
            group, "exchanging gradients", group.near.swap_later(received, sent, received_sizes, sent_sizes)
        )
    # gloo takes three times as long for a reduce-scatter of the same bytes, and adds them in an order of its own.
    work = dist.all_to_all_single(
        received, sent, list(received_sizes), list(sent_sizes), group=group.process_group, async_op=True
    )
    return _waiting(group, "exchanging gradients", lambda: group.wait(work))


def _waiting(group: Group, what: str, wait: Wait) -> Wait:
    def waits() -> None:
        with waiting(group.ranks, what):
            wait()

    return waits


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
    if group.near is not None:
        return _waiting(group, "exchanging weights", group.near.share_later(parts))
    # A broadcast each takes gloo half the time of its all-gather, and needs no common size.
    works = [
        dist.broadcast(part, group=group.process_group, group_src=index, async_op=True)
        for index, part in enumerate(parts)
        if part.numel()
    ]

    def wait() -> None:
        for work in works:
            group.wait(work)

    return _waiting(group, "exchanging weights", wait)


def add_up(tensor: Tensor, group: Group) -> Tensor:
    """The sum over a group, in place."""
    if group.size > 1:
        with waiting(group.ranks):
            if group.near is not None:
                tensor.copy_(group.near.sum(tensor))
            else:
                group.wait(dist.all_reduce(tensor, group=group.process_group, async_op=True))
    return tensor


def summed(tensor: Tensor, group: Group) -> Tensor:
    """The sum over a group, a new tensor."""
    if group.near is None:
        return add_up(tensor.clone(memory_format=torch.contiguous_format), group)
    with waiting(group.ranks):
        return group.near.sum(tensor)


def largest(tensor: Tensor, group: Group) -> Tensor:
    """The largest of a group's, in place."""
    if group.size > 1:
        with waiting(group.ranks):
            if group.near is not None:
                tensor.copy_(group.near.largest(tensor))
            else:
                group.wait(dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=group.process_group, async_op=True))
    return tensor


def gathered(x: Tensor, dim: int, group: Group) -> Tensor:
    """Tensors of one shape, of a dimension or more, at all ranks side by side along one, in the order of ranks."""
    if group.size == 1:
        return x
    with waiting(group.ranks):
        if group.near is not None:
            return group.near.gather(x, dim)
        parts = x.new_empty(group.size, *x.shape)
        group.wait(_all_gather(parts.flatten(0, 1), x.contiguous(), group=group.process_group, async_op=True))
    dim = dim % x.ndim
    return parts.flatten(0, 1) if dim == 0 else parts.movedim(0, dim).flatten(dim, dim + 1)


def scattered_sum(x: Tensor, dim: int, group: Group) -> Tensor:
    """This rank's part, along a dimension, of the sum over a group."""
    dim = dim % x.ndim
    if group.near is not None:
        with waiting(group.ranks):
            return group.near.scatter_sum(x, dim)
    parts = x.unflatten(dim, (group.size, -1)).movedim(dim, 0).contiguous()
    if x.device.type == "cpu":  # gloo's reduce-scatter takes twice as long as this, on two ranks and on four
        return swapped_equal(parts, group).sum(0, dtype=x.dtype)
    own = x.new_empty(parts.shape[1:])
    with waiting(group.ranks):
        group.wait(_reduce_scatter(own, parts.flatten(0, 1), group=group.process_group, async_op=True))
    return own


def swapped(rows: Tensor, sent: Sequence[int], received: Sequence[int], group: Group) -> Tensor:
    """Rows from every rank to every rank.

    Args:
        rows: (sum of sent, ...) by receiver.
        sent: rows for each rank.
        received: rows from each rank.
        group: all of its ranks call together.

    Returns:
        (sum of received, ...) by sender, each in the sender's order.
    """
    if group.size == 1:
        return rows
    with waiting(group.ranks):
        if group.near is not None:
            return group.near.swap(rows, sent, received)
        came = rows.new_empty(sum(received), *rows.shape[1:])
        given = rows.contiguous()
        group.wait(
            dist.all_to_all_single(came, given, list(received), list(sent), group=group.process_group, async_op=True)
        )
    return came


def swapped_equal(parts: Tensor, group: Group) -> Tensor:
    """(P, ...): what goes to each rank -> what came from each."""
    return swapped(parts, [1] * group.size, [1] * group.size, group)


def post(x: Tensor, to: int, tag: int, group: Group) -> Any:
    """Send a tensor to one rank, without waiting for it.

    Args:
        x: contiguous.
        to: the rank, as the group numbers it.
        tag: by which it is asked for; those of one tag come in order.
        group: of both.

    Returns:
        What is under way until it `is_completed`, and to be waited for by `group.wait_message`: till then the tensor
        must not change. None: it has been taken already.
    """
    if group.near is not None:
        return group.near.post(x, (to,), tag)
    return dist.isend(x, group=group.process_group, tag=tag, group_dst=to)


def ask(into: Tensor, by: int, tag: int, group: Group) -> Wait:
    """Gives what waits until a tensor that another rank has sent is there.

    Args:
        into: to be filled, contiguous.
        by: the rank, as the group numbers it.
        tag: that it has sent it with.
        group: of both.
    """
    if group.near is not None:
        return partial(group.near.receive, into, by, tag)
    work = dist.irecv(into, group=group.process_group, tag=tag, group_src=by)
    return lambda: group.wait_message(work)


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
    # Of two, one order is the other.
    add = _add_up_in_order if in_order and group.size > 2 and group.near is None else add_up
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
