"""ZeRO-1 over a group: gradients are summed at who owns them, who updates his shards and gives the weights to all.

The sum is canonical (`canonical.py`): a worker adds the blocks of the tree that are its own, sends every owner its part
of each block's sum, and the owner adds the blocks in the order of the tree. Where micro-batches divide evenly every
worker has one block: the traffic is that of a ring's reduce-scatter, and the sum does not depend on the split, to the
bit (Rajbhandari et al., ZeRO, 2020, section 5; ElasWave, sections 5 and 6).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from resilin.optim.clip import shard_norms
from resilin.parallel.canonical import Node, TreeSum
from resilin.parallel.exchange import Wait, share, swap
from resilin.parallel.group import Group
from resilin.parallel.ownership import Ownership, Run

BUCKET_BYTES = 32 << 20
_PAD = 16  # elements; every shard begins at a multiple, as vector kernels like it


@dataclass(frozen=True)
class _Bucket:
    """Parameters whose gradients travel together.

    Attributes:
        runs: for each rank what it owns of them.
        spans: for each rank where the bucket begins and ends in that rank's flat memory.
        starts: for each rank where each of its runs begins in its part of the bucket.
    """

    runs: list[list[Run]]
    spans: list[tuple[int, int]]
    starts: list[list[int]]

    def size(self, rank: int) -> int:
        """Elements of a rank's part, padding included."""
        low, high = self.spans[rank]
        return high - low


class Reduced(Protocol):
    """Parameters whose gradients are summed over a group, and what of them this rank updates.

    Attributes:
        names: of the parameters.
        parameters: of this rank.
        group: the ranks.
        collects: whether gradients are handed over as sums of blocks; False: they are summed by the backward pass.
        shards: by name what this rank updates.
    """

    names: list[str]
    parameters: list[nn.Parameter]
    group: Group
    collects: bool
    shards: dict[str, nn.Parameter]

    def reduce(self, mine: Sequence[Node], blocks: Sequence[Sequence[tuple[int, int]]]) -> None:
        """Sum the gradients of all workers."""

    def used(self) -> Tensor:
        """(P,) float64: 1 for every parameter that this worker computed a gradient of in this step."""

    def squares(self) -> Tensor:
        """(P, V) float64 squared norms of what is owned here."""

    def set_gradients(self, used: Sequence[bool]) -> None:
        """Put the sums into `.grad` of the shards."""

    def gradients(self) -> list[Tensor]:
        """The summed gradients of what this rank owns."""

    def read(self) -> None:
        """Take the weights of the shards from the parameters."""

    def gather(self) -> None:
        """Give the weights of the shards to all ranks."""


class Reduction:
    """Parameters whose gradients are summed over one group, and the owned shards of them.

    A group of one owns everything as it is: nothing is copied, nothing sent.

    Args:
        parameters: by name; of one dtype, the same at all ranks of the group, in the same order.
        group: the ranks.
        ownership: of their elements.
        exact: whether the order of additions is that of the tree over micro-batches; else each worker adds its own in
            order, and the workers' sums are added in theirs.

    Attributes:
        shards: by name what this rank owns, as parameters for an optimizer; flat (n,), or of the parameter's own
            shape where it is owned in whole.
    """

    collects = True

    def __init__(
        self,
        parameters: Sequence[tuple[str, nn.Parameter]],
        group: Group,
        ownership: Ownership,
        *,
        exact: bool,
        bucket_bytes: int = BUCKET_BYTES,
    ) -> None:
        dtypes = {p.dtype for _, p in parameters}
        if len(dtypes) > 1:
            raise ValueError(f"parameters of several formats, {sorted(map(str, dtypes))}, cannot share a buffer")
        self.names = [name for name, _ in parameters]
        self.parameters = [p for _, p in parameters]
        self.group, self.ownership, self.exact = group, ownership, exact
        self._used = [False] * len(self.parameters)
        self.shards: dict[str, nn.Parameter] = {}
        if group.size == 1:
            self.shards = dict(parameters)
            return
        self._buckets = self._fill_buckets(bucket_bytes)
        size = max((bucket.spans[group.index][1] for bucket in self._buckets), default=0)
        like = self.parameters[0] if self.parameters else torch.empty(0)
        self._weights = torch.zeros(size, dtype=like.dtype, device=like.device)
        self._gradient = torch.zeros_like(self._weights)
        self._own, self._grads = self._views(self._weights), self._views(self._gradient)
        self._make_shards()
        self.read()

    # -- what is where ------------------------------------------------------------------------------------------

    def _fill_buckets(self, bucket_bytes: int) -> list[_Bucket]:
        buckets, begin = [], [0] * self.group.size
        members: list[int] = []
        size = 0
        # The last layers' gradients are there first.
        order = range(len(self.parameters) - 1, -1, -1)
        for place, number in enumerate(order):
            members.append(number)
            size += self.parameters[number].nbytes
            if size < bucket_bytes and place + 1 < len(order):
                continue
            runs, spans, starts = [], [], []
            for rank in range(self.group.size):
                mine = [run for member in members for run in self.ownership.runs_of(member, rank)]
                at, places = 0, []
                for run in mine:
                    places.append(at)
                    at += -(-run.size // _PAD) * _PAD
                runs.append(mine)
                starts.append(places)
                spans.append((begin[rank], begin[rank] + at))
                begin[rank] += at
            buckets.append(_Bucket(runs, spans, starts))
            members, size = [], 0
        return buckets

    def _views(self, flat: Tensor) -> dict[Run, Tensor]:
        """This rank's runs in flat memory of its own."""
        rank = self.group.index
        return {
            run: flat[bucket.spans[rank][0] + start :][: run.size]
            for bucket in self._buckets
            for run, start in zip(bucket.runs[rank], bucket.starts[rank], strict=True)
        }

    def _make_shards(self) -> None:
        """Shards of one run are views of the flat memory; others, which a changed table may leave, are copies."""
        by_parameter: dict[int, list[Run]] = {}
        for run in sorted(self._own, key=lambda run: (run.parameter, run.begin)):
            by_parameter.setdefault(run.parameter, []).append(run)
        self._runs_of = by_parameter
        for number, runs in by_parameter.items():
            value = self._own[runs[0]] if len(runs) == 1 else torch.cat([self._own[run] for run in runs])
            if self.ownership.whole[number] is not None:
                value = value.view(self.parameters[number].shape)
            self.shards[self.names[number]] = nn.Parameter(value)

    # -- gradients ----------------------------------------------------------------------------------------------

    def reduce(self, mine: Sequence[Node], blocks: Sequence[Sequence[tuple[int, int]]]) -> None:
        """Sum the gradients of all workers into `.grad` of the shards.

        Args:
            mine: the sums of this worker's blocks, a tensor or None for each parameter.
            blocks: (start, height) of the blocks of every rank of the group.
        """
        if self.group.size == 1:
            for parameter, grad in zip(self.parameters, self._total(mine), strict=True):
                parameter.grad = grad
            return
        counts = [len(each) for each in blocks] if self.exact else [min(len(each), 1) for each in blocks]
        leaves = [node.sum for node in mine] if self.exact else [self._total(mine)][: len(mine)]
        if len(leaves) != counts[self.group.index]:
            raise ValueError(f"{len(leaves)} blocks were added up where {counts[self.group.index]} are this worker's")
        self._used = [any(leaf[number] is not None for leaf in leaves) for number in range(len(self.parameters))]
        waiting: list[tuple[_Bucket, Tensor, Wait, Tensor]] = []
        for bucket in self._buckets:
            waiting.append(self._send(bucket, leaves, counts))
            if len(waiting) > 1:  # one travels while the next is packed
                self._receive(*waiting.pop(0)[:3], blocks, counts)
        for bucket, received, wait, _ in waiting:
            self._receive(bucket, received, wait, blocks, counts)

    def _total(self, mine: Sequence[Node]) -> list[Tensor | None]:
        """The sum of this worker's blocks: the canonical one, where it has all."""
        if not mine:
            return [None] * len(self.parameters)
        tree = TreeSum()
        for node in mine:
            tree.push(node.sum, node.height if self.group.size == 1 else 0)
        return tree.total()

    def _send(
        self, bucket: _Bucket, leaves: Sequence[Sequence[Tensor | None]], counts: Sequence[int]
    ) -> tuple[_Bucket, Tensor, Wait, Tensor]:
        own, sizes = bucket.size(self.group.index), [bucket.size(rank) for rank in range(self.group.size)]
        like = self._gradient
        sent = like.new_empty(sum(sizes) * len(leaves))
        at, targets, given = 0, [], []
        for rank, size in enumerate(sizes):
            for leaf in leaves:
                for run, start in zip(bucket.runs[rank], bucket.starts[rank], strict=True):
                    target, grad = sent[at + start :][: run.size], leaf[run.parameter]
                    if grad is None:
                        target.zero_()
                    else:
                        targets.append(target)
                        given.append(grad.reshape(-1)[run.begin : run.end])
                at += size
        if targets:
            torch._foreach_copy_(targets, given)
        received = like.new_empty(own * sum(counts))
        wait = swap(received, sent, [own * n for n in counts], [size * len(leaves) for size in sizes], self.group)
        return bucket, received, wait, sent

    def _receive(
        self,
        bucket: _Bucket,
        received: Tensor,
        wait: Wait,
        blocks: Sequence[Sequence[tuple[int, int]]],
        counts: Sequence[int],
    ) -> None:
        wait()
        own = bucket.size(self.group.index)
        if not own or not sum(counts):
            return
        tree = TreeSum()
        parts = iter(received.split(own))
        for each, count in zip(blocks, counts, strict=True):
            for _, height in each if self.exact else [(0, 0)] * count:
                tree.push([next(parts)], height)
        (total,) = tree.total()
        assert total is not None
        low, high = bucket.spans[self.group.index]
        self._gradient[low:high].copy_(total)

    def used(self) -> Tensor:
        """(P,) float64: 1 for every parameter that this worker computed a gradient of in this step."""
        flags = [p.grad is not None for p in self.parameters] if self.group.size == 1 else self._used
        return torch.tensor(flags, dtype=torch.float64)

    def set_gradients(self, used: Sequence[bool]) -> None:
        """Put the sums into `.grad` of the shards, or None for parameters that nobody computed a gradient of."""
        if self.group.size == 1:
            return
        for number, runs in self._runs_of.items():
            shard = self.shards[self.names[number]]
            if not used[number]:
                shard.grad = None
                continue
            grad = self._grads[runs[0]] if len(runs) == 1 else torch.cat([self._grads[run] for run in runs])
            shard.grad = grad.view(shard.shape)

    def squares(self) -> Tensor:
        """(P, V) float64 squared norms of the owned virtual shards of the summed gradients, zeros elsewhere."""
        shards = len(self.ownership.owners)
        found = torch.zeros(len(self.parameters), shards, dtype=torch.float64)
        if self.group.size == 1:
            runs = [(Run(n, 0, shards, 0, p.numel()), p.grad) for n, p in enumerate(self.parameters)]
            owned = [(run, grad.reshape(-1)) for run, grad in runs if grad is not None]
        else:
            owned = list(self._grads.items())
        pieces = [
            piece
            for run, grad in owned
            for piece in shard_norms(grad, self.ownership.sizes[run.parameter], run.first, run.stop, shards=shards)
        ]
        if pieces:
            row = np.concatenate([np.arange(run.first, run.stop) + run.parameter * shards for run, _ in owned])
            found.view(-1)[torch.from_numpy(row)] = torch.cat(pieces).double().square().cpu()
        return found

    def gradients(self) -> list[Tensor]:
        """The summed gradients of what this rank owns: writing to them scales the update."""
        return [p.grad for p in self.shards.values() if p.grad is not None]

    # -- weights ------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def read(self) -> None:
        """Take the weights of the shards from the parameters, which a checkpoint may have filled."""
        if self.group.size == 1:
            return
        for run, view in self._own.items():
            view.copy_(self.parameters[run.parameter].detach().reshape(-1)[run.begin : run.end])
        for number, runs in self._runs_of.items():
            if len(runs) > 1:
                self.shards[self.names[number]].data.copy_(torch.cat([self._own[run] for run in runs]))

    @torch.no_grad()
    def gather(self) -> None:
        """Give the weights of the shards, as the optimizer left them, to all ranks."""
        if self.group.size == 1:
            return
        for number, runs in self._runs_of.items():
            if len(runs) > 1:
                parts = self.shards[self.names[number]].detach().split([run.size for run in runs])
                for run, part in zip(runs, parts, strict=True):
                    self._own[run].copy_(part)
        sizes = [[bucket.size(rank) for rank in range(self.group.size)] for bucket in self._buckets]
        parts = [list(self._weights.new_empty(sum(each)).split(each)) for each in sizes]
        waits = []
        for bucket, each in zip(self._buckets, parts, strict=True):
            each[self.group.index] = self._weights[slice(*bucket.spans[self.group.index])]
            waits.append(share(each, self.group))
        for bucket, each, wait in zip(self._buckets, parts, waits, strict=True):
            wait()
            targets, given = [], []
            for runs, starts, part in zip(bucket.runs, bucket.starts, each, strict=True):
                for run, start in zip(runs, starts, strict=True):
                    targets.append(self.parameters[run.parameter].detach().view(-1)[run.begin : run.end])
                    given.append(part[start : start + run.size])
            torch._foreach_copy_(targets, given)
