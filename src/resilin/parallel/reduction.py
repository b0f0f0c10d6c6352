"""ZeRO-1 over a group: gradients are summed at who owns them, who updates his shards and gives the weights to all.

The sum is canonical (`canonical.py`): a worker adds the blocks of the tree that are its own, sends every owner its part
of each block's sum, and the owner adds the blocks in the order of the tree. Where micro-batches divide evenly every
worker has one block: the traffic is that of a ring's reduce-scatter, and the sum does not depend on the split, to the
bit (Rajbhandari et al., ZeRO, 2020, section 5; ElasWave, sections 5 and 6).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from resilin.optim.clip import shard_norms
from resilin.parallel.canonical import Node, TreeSum
from resilin.parallel.errors import ParallelError
from resilin.parallel.exchange import Wait, share, swap
from resilin.parallel.group import Group
from resilin.parallel.ownership import Ownership, Run
from resilin.parallel.pool import Pool

BUCKET_BYTES = 32 << 20
_IN_FLIGHT = 2  # buckets that travel at one time
_PAD = 16  # elements; every shard begins at a multiple, as vector kernels like it


@dataclass(frozen=True)
class _Bucket:
    """Parameters whose gradients travel together.

    Attributes:
        runs: for each rank what it owns of them.
        spans: for each rank where the bucket begins and ends in that rank's flat memory.
        starts: for each rank where each of its runs begins in its part of the bucket.
        given: whether their sums come from elsewhere: then only their weights travel.
    """

    runs: list[list[Run]]
    spans: list[tuple[int, int]]
    starts: list[list[int]]
    given: bool

    def size(self, rank: int) -> int:
        """Elements of a rank's part, padding included."""
        low, high = self.spans[rank]
        return high - low


@dataclass(frozen=True)
class _Sent:
    """A bucket on its way.

    Attributes:
        bucket: which.
        own: for each of this worker's blocks what stays here; the first in its place in the gradient.
        received: what comes from all others, in the order of ranks and blocks.
        wait: until it is there.
    """

    bucket: _Bucket
    own: list[Tensor]
    received: Tensor
    wait: Wait


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

    def sums_of(self, name: str) -> list[Tensor]:
        """What is owned here of a parameter's summed gradient, in order of its elements; another rank may fill it."""

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
        given: names of parameters whose sums are put into `sums_of` by others, who have them.

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
        given: Collection[str] = (),
        bucket_bytes: int = BUCKET_BYTES,
    ) -> None:
        dtypes = {p.dtype for _, p in parameters}
        if len(dtypes) > 1:
            raise ParallelError(
                f"trained parameters have several formats, {', '.join(sorted(map(str, dtypes)))}, and travel in one "
                "buffer: train them all in one, or use one worker"
            )
        self.names = [name for name, _ in parameters]
        self.parameters = [p for _, p in parameters]
        self.group, self.ownership, self.exact = group, ownership, exact
        self._used = [False] * len(self.parameters)
        self.shards: dict[str, nn.Parameter] = {}
        if group.size == 1:
            self.shards = dict(parameters)
            return
        self._buckets = self._fill_buckets(bucket_bytes, given)
        size = max((bucket.spans[group.index][1] for bucket in self._buckets), default=0)
        like = self.parameters[0] if self.parameters else torch.empty(0)
        self._weights = torch.zeros(size, dtype=like.dtype, device=like.device)
        self._gradient = torch.zeros_like(self._weights)
        self._packed, self._beside, self._received = (Pool(like, _IN_FLIGHT) for _ in range(3))
        self._own, self._grads = self._views(self._weights), self._views(self._gradient)
        self._make_shards()
        self.read()

    # -- what is where ------------------------------------------------------------------------------------------

    def _fill_buckets(self, bucket_bytes: int, given: Collection[str]) -> list[_Bucket]:
        buckets, begin = [], [0] * self.group.size
        members: list[int] = []
        size = 0
        # The last layers' gradients are there first.
        order = range(len(self.parameters) - 1, -1, -1)
        kinds = [name in given for name in self.names]
        for place, number in enumerate(order):
            members.append(number)
            size += self.parameters[number].nbytes
            more = place + 1 < len(order) and kinds[order[place + 1]] is kinds[number]
            if size < bucket_bytes and more:
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
            buckets.append(_Bucket(runs, spans, starts, kinds[number]))
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
            self._used = [parameter.grad is not None for parameter in self.parameters]
            return
        counts = [len(each) for each in blocks] if self.exact else [min(len(each), 1) for each in blocks]
        leaves = [node.sum for node in mine] if self.exact else [self._total(mine)][: len(mine)]
        if len(leaves) != counts[self.group.index]:
            raise ValueError(f"{len(leaves)} blocks were added up where {counts[self.group.index]} are this worker's")
        self._used = [any(leaf[number] is not None for leaf in leaves) for number in range(len(self.parameters))]
        waiting: list[_Sent] = []
        for bucket in self._buckets:
            if bucket.given:
                continue
            waiting.append(self._send(bucket, leaves, counts))
            if len(waiting) == _IN_FLIGHT:  # one travels while the next is packed
                self._receive(waiting.pop(0), blocks, counts)
        for sent in waiting:
            self._receive(sent, blocks, counts)

    def _total(self, mine: Sequence[Node]) -> list[Tensor | None]:
        """The sum of this worker's blocks: the canonical one, where it has all."""
        if not mine:
            return [None] * len(self.parameters)
        tree = TreeSum()
        for node in mine:
            tree.push(node.sum, node.height if self.group.size == 1 else 0)
        return tree.total()

    def _send(self, bucket: _Bucket, leaves: Sequence[Sequence[Tensor | None]], counts: Sequence[int]) -> _Sent:
        """Pack a bucket for all others, and what stays here where it is to be added up."""
        me, sizes = self.group.index, [bucket.size(rank) for rank in range(self.group.size)]
        gives = [0 if rank == me else size * len(leaves) for rank, size in enumerate(sizes)]
        gets = [0 if rank == me else sizes[me] * count for rank, count in enumerate(counts)]
        packed = self._packed.take(sum(gives))
        own = [self._gradient[slice(*bucket.spans[me])]] if leaves else []
        if len(leaves) > 1:
            beside = self._beside.take(sizes[me] * (len(leaves) - 1))
            own += beside.view(len(leaves) - 1, sizes[me]).unbind()
        places = iter(packed.split([size for rank, size in enumerate(sizes) if rank != me for _ in leaves]))
        targets, given = [], []
        for rank in range(self.group.size):
            for leaf, place in zip(leaves, own if rank == me else places, strict=False):
                for run, start in zip(bucket.runs[rank], bucket.starts[rank], strict=True):
                    target, grad = place[start : start + run.size], leaf[run.parameter]
                    if grad is None:
                        target.zero_()
                    else:
                        targets.append(target)
                        given.append(grad.reshape(-1)[run.begin : run.end])
        if targets:
            torch._foreach_copy_(targets, given)
        received = self._received.take(sum(gets))
        return _Sent(bucket, own, received, swap(received, packed, gets, gives, self.group))

    def _receive(self, sent: _Sent, blocks: Sequence[Sequence[tuple[int, int]]], counts: Sequence[int]) -> None:
        sent.wait()
        size, me = sent.bucket.size(self.group.index), self.group.index
        if not size or not sum(counts):
            return
        tree = TreeSum(home=sent.own[0] if sent.own else None)
        theirs = iter(sent.received.split(size))
        parts: list[tuple[tuple[int, int], Tensor]] = []
        for rank, (each, count) in enumerate(zip(blocks, counts, strict=True)):
            mine = iter(sent.own) if rank == me else theirs
            parts += [(block, next(mine)) for block in (each if self.exact else [(rank, 0)] * count)]
        for (_, height), part in sorted(parts, key=lambda one: one[0][0]):
            tree.push([part], height)
        (total,) = tree.total()
        assert total is not None
        if not sent.own:
            self._gradient[slice(*sent.bucket.spans[me])].copy_(total)

    def sums_of(self, name: str) -> list[Tensor]:
        """What is owned here of a parameter's summed gradient, in order of its elements; zeros where none is yet."""
        number = self.names.index(name)
        if self.group.size > 1:
            return [self._grads[run] for run in self._runs_of.get(number, ())]
        parameter = self.parameters[number]
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        return [parameter.grad]

    def used(self) -> Tensor:
        """(P,) float64: 1 for every parameter that this worker computed a gradient of in this step."""
        return torch.tensor(self._used, dtype=torch.float64)

    def set_gradients(self, used: Sequence[bool]) -> None:
        """Put the sums into `.grad` of the shards, or None for parameters that nobody computed a gradient of."""
        if self.group.size == 1:
            for parameter, flag in zip(self.parameters, used, strict=True):
                parameter.grad = parameter.grad if flag else None  # zeros that were summed over a team are none
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
        waiting: list[tuple[_Bucket, list[Tensor], Wait]] = []
        for bucket in self._buckets:
            sizes = [0 if rank == self.group.index else bucket.size(rank) for rank in range(self.group.size)]
            parts = list(self._received.take(sum(sizes)).split(sizes))
            parts[self.group.index] = self._weights[slice(*bucket.spans[self.group.index])]
            waiting.append((bucket, parts, share(parts, self.group)))
            if len(waiting) == _IN_FLIGHT:
                self._fill(*waiting.pop(0))
        for each in waiting:
            self._fill(*each)

    def _fill(self, bucket: _Bucket, parts: Sequence[Tensor], wait: Wait) -> None:
        """Put the weights of a bucket into the parameters."""
        wait()
        targets, given = [], []
        for runs, starts, part in zip(bucket.runs, bucket.starts, parts, strict=True):
            for run, start in zip(runs, starts, strict=True):
                targets.append(self.parameters[run.parameter].detach().view(-1)[run.begin : run.end])
                given.append(part[start : start + run.size])
        torch._foreach_copy_(targets, given)
