"""From the copies that survivors have to the states that a member of the next view owns: one `plan`, then reads.

Copies are flat: of every parameter a member has the elements it owns, in order, once for the weights and once for each
state of the optimizer, which lie alike. So what is planned is one interval at a time of a parameter's elements.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from resilin.checkpoint.tensor_record import DTYPES
from resilin.cluster.parts import Read
from resilin.cluster.peer import Peer
from resilin.cluster.pool import Copy, CopyError, Pool, Slot, slots_of
from resilin.layout import Layout, Place, Region, plan
from resilin.parallel.ownership import Ownership


@dataclass(frozen=True, slots=True)
class Owners:
    """Who owns what of some parameters.

    Attributes:
        names: of the parameters.
        ownership: of their elements.
        members: the numbers of those whom `ownership` counts.
        experts: numbers of the experts that these members have of every parameter, one after the other; (): they have
            all of it.
        of: so many experts, of one size.
    """

    names: tuple[str, ...]
    ownership: Ownership
    members: tuple[int, ...]
    experts: tuple[int, ...] = ()
    of: int = 1

    def size(self, number: int) -> int:
        """Elements of a parameter, those that these members do not have among them."""
        return self.ownership.sizes[number] * self.of // max(len(self.experts), 1)

    def owned(self, number: int, place: int) -> list[Region]:
        """What a member owns of a parameter, in its order there: where it lies in the whole."""
        return [
            region
            for run in self.ownership.runs_of(number, place)
            for region in self._regions(number, run.begin, run.end)
        ]

    def held(self, number: int) -> list[Region]:
        """What every one of these members has of a parameter."""
        return self._regions(number, 0, self.ownership.sizes[number])

    def _regions(self, number: int, begin: int, end: int) -> list[Region]:
        if not self.experts:
            return [Region((begin,), (end - begin,))]
        each = self.ownership.sizes[number] // len(self.experts)
        found = []
        for place, expert in enumerate(self.experts):
            low, high = max(begin, place * each), min(end, (place + 1) * each)
            if low < high:
                found.append(Region((low + (expert - place) * each,), (high - low,)))
        return found


@dataclass(frozen=True, slots=True)
class Piece:
    """An interval of a parameter's elements, in a copy and where it is wanted.

    Attributes:
        owner: whose copy.
        start: the first element there, counted in what that member owns of the parameter.
        at: the first element where it is wanted.
        values: how many.
    """

    owner: int
    start: int
    at: int
    values: int


def pieces_owned(before: Sequence[Owners], after: Sequence[Owners], member: int) -> dict[str, list[Piece]]:
    """What makes up the elements that a member owns from now on.

    Args:
        before: of all parameters.
        after: of those that the member has.
        member: its number.
    """
    names = {name for each in after for name in each.names}
    return _pieces(before, after, names, member, lambda each, number: each.owned(number, each.members.index(member)))


def pieces_held(
    before: Sequence[Owners], after: Sequence[Owners], names: Collection[str], member: int
) -> dict[str, list[Piece]]:
    """What makes up all that a member has of some parameters; see `pieces_owned`."""
    return _pieces(before, after, names, member, Owners.held)


def _place(member: int) -> Place:
    return Place("host", str(member))


def _by_name(owners: Sequence[Owners], names: Collection[str]) -> dict[str, list[tuple[Owners, int]]]:
    """Of some parameters who owns them, and their numbers there."""
    found: dict[str, list[tuple[Owners, int]]] = {}
    for each in owners:
        for number, name in enumerate(each.names):
            if name in names:
                found.setdefault(name, []).append((each, number))
    return found


def _kind(owned: Sequence[tuple[Owners, int]]) -> tuple[object, ...]:
    """Equal for parameters that are owned in the same way."""
    return tuple((id(each), each.ownership.sizes[number], each.ownership.whole[number]) for each, number in owned)


def _pieces(
    before: Sequence[Owners],
    after: Sequence[Owners],
    names: Collection[str],
    member: int,
    wish: Callable[[Owners, int], list[Region]],
) -> dict[str, list[Piece]]:
    had, has = _by_name(before, names), _by_name(after, names)
    # Blocks are alike: what is planned for a parameter holds for all of its kind.
    kinds: dict[object, list[str]] = {}
    for name, owned in has.items():
        kinds.setdefault((_kind(had.get(name, ())), _kind(owned)), []).append(name)
    wanted: dict[str, list[Region]] = {}  # by the first of a kind, where there is anything
    for first, *_ in kinds.values():
        if regions := [region for each, number in has[first] for region in wish(each, number)]:
            wanted[first] = regions
    shapes = {name: ((each.size(number),), "U8") for name in wanted for each, number in had.get(name, ())}
    held = [
        (name, _place(owner), region)
        for name in wanted
        for each, number in had.get(name, ())
        for index, owner in enumerate(each.members)
        for region in each.owned(number, index)
    ]
    here = _place(member)
    source = Layout.of(shapes, held)
    target = Layout.of(shapes, [(name, here, region) for name, regions in wanted.items() for region in regions])
    found: dict[str, list[Piece]] = {}
    for move in plan(source, target):
        piece = Piece(int(move.source.place.name), move.source.start, move.target.start, move.region.numel)
        found.setdefault(move.tensor, []).append(piece)
    return {name: found.get(alike[0], []) for alike in kinds.values() if alike[0] in wanted for name in alike}


@dataclass(frozen=True, slots=True)
class Need:
    """A tensor to be filled.

    Attributes:
        parameter: whose it is.
        path: of the slot in copies.
        memory: contiguous, in host memory; of the elements that pieces say, or, where the slot does not go by
            elements (a step count, the state of a matrix owned in whole), of the slot's own size.
        pieces: of the parameter.
    """

    parameter: str
    path: str
    memory: Tensor
    pieces: Sequence[Piece]


@dataclass(frozen=True)
class Shared:
    """What a copy holds that is no owner's alone.

    Attributes:
        owner: whose copy.
        rest: its JSON values.
        tensors: by path, not filled yet.
    """

    owner: int
    rest: Any
    tensors: dict[str, Tensor]


@dataclass
class Ahead:
    """What was read of some copies before it is known where it goes.

    Attributes:
        key: epoch and version of the copies.
        heads: by owner.
        parts: by owner, first byte and number of bytes.
    """

    key: tuple[int, int]
    heads: dict[int, dict[str, Any]] = field(default_factory=dict)
    parts: dict[tuple[int, int, int], Tensor] = field(default_factory=dict)

    @property
    def bytes(self) -> int:
        """How many, of all parts."""
        return sum(part.numel() for part in self.parts.values())


class Restorer:
    """Reads from the copies of one version, wherever they are.

    Args:
        pool: this member's.
        epoch: of the view under which the copies were made.
        version: steps committed.
        where: by owner the member in whose memory its copy is read.
        connect: to another member.
        ahead: what was read of the same copies before.

    Attributes:
        reads: by owner what was read of its states, here or elsewhere.
    """

    def __init__(
        self,
        pool: Pool,
        epoch: int,
        version: int,
        where: Mapping[int, int],
        connect: Callable[[int], Peer],
        ahead: Ahead | None = None,
    ) -> None:
        self._pool, self._key, self._where, self._connect = pool, (epoch, version), where, connect
        self._ahead = ahead if ahead is not None and ahead.key == self._key else Ahead(self._key)
        self._heads: dict[int, tuple[dict[tuple[str, str], Slot], Copy | None]] = {}
        self._rest: dict[int, Any] = {}
        self.reads: dict[int, Read] = {}

    def _head(self, owner: int) -> tuple[dict[tuple[str, str], Slot], Copy | None]:
        if owner not in self._heads:
            place = self._where[owner]
            if place == self._pool.member:
                copy = self._pool.get(owner, *self._key)
                copy.check()
                self._heads[owner] = {(s.parameter, s.path): s for s in copy.slots}, copy
                self._rest[owner] = copy.rest
            else:
                if owner not in self._ahead.heads:
                    self._ahead.heads[owner] = self._connect(place).head(owner, *self._key)
                head = self._ahead.heads[owner]
                self._heads[owner] = {(s.parameter, s.path): s for s in slots_of(head)}, None
                self._rest[owner] = head["rest"]
        return self._heads[owner]

    def rest(self, owner: int) -> Shared:
        """What of a copy is no owner's alone."""
        slots, _ = self._head(owner)
        tensors = {
            slot.path: torch.empty(slot.shape, dtype=DTYPES[slot.dtype])
            for (parameter, _), slot in slots.items()
            if not parameter
        }
        return Shared(owner, self._rest[owner], tensors)

    def fill(self, needs: Sequence[Need]) -> None:
        """Fill tensors.

        Raises:
            CopyError: a copy is missing or damaged, or has something else.
            PeerError: a member went away.
        """
        for owner, entries in self._entries(needs).items():
            begun, known = time.monotonic(), self.reads.get(owner, Read())
            size = self._read(owner, entries)
            self.reads[owner] = Read(known.seconds + time.monotonic() - begun, known.bytes + size)

    def fetch(self, needs: Sequence[Need]) -> Ahead:
        """Read what `fill` would read from other members, for another restorer of the same copies.

        Raises:
            CopyError, PeerError: as for `fill`.
        """
        for owner, entries in self._entries(needs).items():
            if self._head(owner)[1] is None:
                places = [(start, size) for start, size, _ in entries]
                parts = self._connect(self._where[owner]).get(owner, *self._key, places)
                self._ahead.parts.update({(owner, *at): part for at, part in zip(places, parts, strict=True)})
        return self._ahead

    def slots(self, owner: int) -> Mapping[tuple[str, str], Slot]:
        """What a copy has, by parameter and path."""
        return self._head(owner)[0]

    def _entries(self, needs: Sequence[Need]) -> dict[int, list[tuple[int, int, Tensor]]]:
        """By owner: first byte in its copy, bytes, where to."""
        asked: dict[int, list[tuple[int, int, Tensor]]] = {}
        for need in needs:
            memory = need.memory.view(-1)
            if not need.memory.is_contiguous():
                raise ValueError(f"the memory for {need.path} of {need.parameter!r} is not contiguous")
            for piece in need.pieces:
                slots, _ = self._head(piece.owner)
                slot = slots.get((need.parameter, need.path))
                if slot is None:
                    raise CopyError(f"the copy of member {piece.owner} has no {need.path} of {need.parameter!r}")
                if DTYPES[slot.dtype] != memory.dtype:
                    raise CopyError(f"{need.path} of {need.parameter!r} is {slot.dtype} there and {memory.dtype} here")
                item = memory.element_size()
                if memory.numel() >= piece.at + piece.values and slot.bytes >= (piece.start + piece.values) * item:
                    to = memory[piece.at : piece.at + piece.values]
                    entry = slot.start + piece.start * item, piece.values * item, to
                elif slot.bytes == memory.nbytes:  # not by elements: any owner's will do
                    entry = slot.start, slot.bytes, memory
                else:
                    raise CopyError(
                        f"{need.path} of {need.parameter!r} has {slot.bytes} bytes at member {piece.owner} and "
                        f"{memory.nbytes} here"
                    )
                asked.setdefault(piece.owner, []).append(entry)
                if entry[2] is memory:
                    break
        return asked

    def _read(self, owner: int, entries: Sequence[tuple[int, int, Tensor]]) -> int:
        """Fill what is wanted of a copy; returns how many bytes were not there before."""
        _, copy = self._head(owner)
        lacking: list[tuple[int, Tensor]] = []
        there = 0
        for start, size, to in entries:
            into = to.view(torch.uint8)  # bytes: what is read may lie at any address
            if copy is not None:
                into.copy_(copy.data[start : start + size])
            elif (part := self._ahead.parts.get((owner, start, size))) is not None:
                into.copy_(part)
                there += size
            else:
                lacking.append((start, into))
        if lacking:
            self._connect(self._where[owner]).fill(owner, *self._key, lacking)
        return sum(size for _, size, _ in entries) - there
