"""ZeRO-1 over a group: gradients are summed at who owns them, who updates his shards and gives the weights to all.

The sum is canonical (`canonical.py`): a worker adds the blocks of the tree that are its own, sends every owner its part
of each block's sum, and the owner adds the blocks in the order of the tree. Where micro-batches divide evenly every
worker has one block: the traffic is that of a ring's reduce-scatter, and the sum does not depend on the split, to the
bit (Rajbhandari et al., ZeRO, 2020, section 5; ElasWave, sections 5 and 6).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from resilin.memory.pages import Pages, Spares
from resilin.optim.clip import shard_norms
from resilin.parallel.canonical import Node, TreeSum
from resilin.parallel.carriers import Carrier, carrier_of
from resilin.parallel.errors import ParallelError
from resilin.parallel.group import Group
from resilin.parallel.ownership import Ownership, Run
from resilin.parallel.pool import Pool

BUCKET_BYTES = 8 << 20
"""Small, as memory for what is sent and received grows with it: after a loss, workers have blocks that are no
neighbours, send each by itself, and touch that memory for the first time while all wait."""
_shown = Spares(2)
"""Memory for weights, apart from that of groups, so that it is used for what it was touched for."""
_own = Spares(2, shown=False)
"""Likewise for gradients, which nobody else looks at."""
_PAD = 16  # elements; every shard begins at a multiple, as vector kernels like it


@dataclass(frozen=True, slots=True)
class _Piece:
    """Neighbouring elements of a parameter, in a bucket.

    Attributes:
        parameter: its number.
        begin: the first element, in row-major order.
        end: one past the last.
        start: where it begins in its rank's part of the bucket.
    """

    parameter: int
    begin: int
    end: int
    start: int

    def of(self, part: Tensor) -> Tensor:
        """Its place in a rank's part of the bucket."""
        return part[self.start : self.start + self.end - self.begin]


@dataclass(frozen=True)
class _Bucket:
    """What travels together: of every rank's flat memory the next so many elements.

    Attributes:
        pieces: for each rank what lies there.
        spans: for each rank where the bucket begins and ends in its flat memory.
        given: whether their sums come from elsewhere: then only their weights travel.
    """

    pieces: list[list[_Piece]]
    spans: list[tuple[int, int]]
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
        arrived: waits for what comes from all others, by rank.
    """

    bucket: _Bucket
    own: list[Tensor]
    arrived: Callable[[], list[Tensor]]


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
        filled: whether the parameters have their weights; False: `read` is called once they do.
        bucket_bytes: of gradients that travel together.
        shared: whether ranks of one machine exchange through memory that all of them see.

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
        filled: bool = True,
        bucket_bytes: int = BUCKET_BYTES,
        shared: bool = True,
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
        self._pages: list[Pages] = []  # of weights and gradient
        if group.size == 1:
            self.shards = dict(parameters)
            return
        self._lay_out(bucket_bytes, given)
        like = self.parameters[0] if self.parameters else torch.empty(0)
        size = self._size * like.element_size()
        if shared and like.device.type == "cpu":
            self._pages = [_shown.take(size), _own.take(size)]
            self._weights, self._gradient = (pages.data[:size].view(like.dtype) for pages in self._pages)
            self._gradient.zero_()
        else:
            self._weights = torch.zeros(self._size, dtype=like.dtype, device=like.device)
            self._gradient = torch.zeros_like(self._weights)
        self._beside = Pool(like, 2)
        self._made: Carrier | None = None
        self._shown = False  # whether the others may be taking weights from this rank's memory
        self._own, self._grads = self._views(self._weights), self._views(self._gradient)
        self._make_shards()
        if filled:
            self.read()

    # -- what is where ------------------------------------------------------------------------------------------

    def _lay_out(self, bucket_bytes: int, given: Collection[str]) -> None:
        """Every rank's flat memory, parameter by parameter: what it owns of one lies together."""
        ranks = range(self.group.size)
        self._buckets: list[_Bucket] = []
        self._at: dict[int, int] = {}  # by parameter where this rank's runs of it begin
        ends = [0] * self.group.size
        # The last layers' gradients are there first.
        for kind, members in groupby(range(len(self.parameters) - 1, -1, -1), lambda n: self.names[n] in given):
            begins, numbers = list(ends), list(members)
            lying: list[list[tuple[int, Run]]] = [[] for _ in ranks]
            for number in numbers:
                for rank in ranks:
                    at = ends[rank]
                    for run in self.ownership.runs_of(number, rank):
                        lying[rank].append((at, run))
                        if rank == self.group.index:
                            self._at.setdefault(number, at)
                        at += run.size
                    ends[rank] += -(-(at - ends[rank]) // _PAD) * _PAD
            count = max(-(-sum(self.parameters[number].nbytes for number in numbers) // bucket_bytes), 1)
            cuts = [_cuts(begins[rank], ends[rank], count) for rank in ranks]
            pieces = [_pieces(lying[rank], cuts[rank]) for rank in ranks]
            for place in range(count):
                spans = [(cuts[rank][place], cuts[rank][place + 1]) for rank in ranks]
                self._buckets.append(_Bucket([pieces[rank][place] for rank in ranks], spans, kind))
        self._size = ends[self.group.index]

    def _views(self, flat: Tensor) -> dict[Run, Tensor]:
        """This rank's runs in flat memory of its own."""
        found = {}
        for number, at in self._at.items():
            for run in self.ownership.runs_of(number, self.group.index):
                found[run] = flat[at : at + run.size]
                at += run.size
        return found

    def _whole(self, number: int, flat: Tensor) -> Tensor:
        """All that this rank owns of a parameter, in flat memory."""
        owned = sum(run.size for run in self._runs_of[number])
        found = flat[self._at[number] : self._at[number] + owned]
        return found if self.ownership.whole[number] is None else found.view(self.parameters[number].shape)

    def _make_shards(self) -> None:
        self._runs_of: dict[int, list[Run]] = {}
        for run in sorted(self._own, key=lambda run: (run.parameter, run.begin)):
            self._runs_of.setdefault(run.parameter, []).append(run)
        for number in self._runs_of:
            self.shards[self.names[number]] = nn.Parameter(self._whole(number, self._weights))

    @property
    def _carrier(self) -> Carrier:
        if self._made is None:  # what is built for a look at it meets nobody
            self._made = carrier_of(self.group, self._weights, self._pages[0] if self._pages else None)
        return self._made

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
            if len(waiting) == self._carrier.in_flight:  # one travels while the next is packed
                self._receive(waiting.pop(0), blocks, counts)
        for sent in waiting:
            self._receive(sent, blocks, counts)

    def _total(self, mine: Sequence[Node]) -> list[Tensor | None]:
        """The sum of this worker's blocks: the canonical one, where it has all."""
        if not mine:
            return [None] * len(self.parameters)
        tree = TreeSum()
        whole = self.exact and self.group.size == 1
        for node in mine:
            tree.push(node.sum, node.height if whole else 0)
        return tree.total()

    def _send(self, bucket: _Bucket, leaves: Sequence[Sequence[Tensor | None]], counts: Sequence[int]) -> _Sent:
        """Pack a bucket for all others, and what stays here where it is to be added up."""
        me, sizes = self.group.index, [bucket.size(rank) for rank in range(self.group.size)]
        table = [[0 if to == by else size * count for to, size in enumerate(sizes)] for by, count in enumerate(counts)]
        packed = self._carrier.room(table)
        own = [self._gradient[slice(*bucket.spans[me])]] if leaves else []
        if len(leaves) > 1:
            beside = self._beside.take(sizes[me] * (len(leaves) - 1))
            own += beside.view(len(leaves) - 1, sizes[me]).unbind()
        places = iter(packed.split([size for rank, size in enumerate(sizes) if rank != me for _ in leaves]))
        targets, given = [], []
        for rank in range(self.group.size):
            for leaf, place in zip(leaves, own if rank == me else places, strict=False):
                for piece in bucket.pieces[rank]:
                    target, grad = piece.of(place), leaf[piece.parameter]
                    if grad is None:
                        target.zero_()
                    else:
                        targets.append(target)
                        given.append(grad.reshape(-1)[piece.begin : piece.end])
        if targets:
            torch._foreach_copy_(targets, given)
        self._shown = False  # whoever takes part in an exchange has taken the weights before
        return _Sent(bucket, own, self._carrier.swap(packed, table))

    def _receive(self, sent: _Sent, blocks: Sequence[Sequence[tuple[int, int]]], counts: Sequence[int]) -> None:
        arrived = sent.arrived()
        size, me = sent.bucket.size(self.group.index), self.group.index
        if not size or not sum(counts):
            return
        tree = TreeSum(home=sent.own[0] if sent.own else None)
        parts: list[tuple[tuple[int, int], Tensor]] = []
        for rank, (each, count) in enumerate(zip(blocks, counts, strict=True)):
            mine = iter(sent.own if rank == me else arrived[rank].split(size))
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
        for number in self._runs_of:
            self.shards[self.names[number]].grad = self._whole(number, self._gradient) if used[number] else None

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
        if self._shown:  # others may still be taking them
            self._carrier.show()
            self._shown = False
        for run, view in self._own.items():
            view.copy_(self.parameters[run.parameter].detach().reshape(-1)[run.begin : run.end])

    @torch.no_grad()
    def gather(self) -> None:
        """Give the weights of the shards, as the optimizer left them, to all ranks."""
        if self.group.size == 1:
            return
        self._carrier.show()
        self._shown = True
        waiting: list[tuple[_Bucket, Callable[[], list[Tensor]]]] = []
        for bucket in self._buckets:
            waiting.append((bucket, self._carrier.weights(bucket.spans)))
            if len(waiting) == self._carrier.in_flight:
                self._fill(*waiting.pop(0))
        for each in waiting:
            self._fill(*each)

    def touch(self, times: float) -> None:
        """Have memory ready for a reduction that comes after this one, whose rank owns so many times as much."""
        for pages in tuple(self._pages):
            pages.touch(int(times * self._weights.nbytes))

    def give_up(self) -> None:
        """Leave the memory of weights and gradient to others: shards are not to be used any more."""
        for spares, pages in zip((_shown, _own), self._pages, strict=False):
            spares.give(pages)
        self._pages = []

    def _fill(self, bucket: _Bucket, arrived: Callable[[], list[Tensor]]) -> None:
        """Put the weights of a bucket into the parameters."""
        targets, given = [], []
        for pieces, part in zip(bucket.pieces, arrived(), strict=True):
            for piece in pieces:
                targets.append(self.parameters[piece.parameter].detach().view(-1)[piece.begin : piece.end])
                given.append(piece.of(part))
        torch._foreach_copy_(targets, given)


def _cuts(begin: int, end: int, count: int) -> list[int]:
    """Where so many buckets begin and end in a rank's flat memory."""
    step = -(-(end - begin) // (count * _PAD)) * _PAD
    return [min(begin + place * step, end) for place in range(count + 1)]


def _pieces(lying: Sequence[tuple[int, Run]], cuts: Sequence[int]) -> list[list[_Piece]]:
    """What lies in each bucket, of runs and where they begin in a rank's flat memory."""
    found: list[list[_Piece]] = [[] for _ in cuts[1:]]
    place = 0
    for at, run in lying:
        low, end = at, at + run.size
        while low < end:
            while cuts[place + 1] <= low:
                place += 1
            high = min(end, cuts[place + 1])
            begin = run.begin + low - at
            found[place].append(_Piece(run.parameter, begin, begin + high - low, low - cuts[place]))
            low = high
    return found
