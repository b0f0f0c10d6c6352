"""What ranks on the CPUs of one machine exchange lies in memory that all of them see.

A backend carries a sum in several messages, each copied by the system and handed from thread to thread; on a machine
whose cores all compute, each of these hands costs more than the sum. Here every rank puts what it has into pages that
all others have mapped, says so over a `Line`, and everyone reads what it needs. Two patterns:

- *rooms*, for what all do together (`show` and everything built on it): a rank has a room of two halves, filled in
  turn. Who says that the next is shown has read the last, so nothing is ever overwritten that somebody reads.
- *letters*, for what one rank has for others at its own time (`post`, `receive`): each lies in a box until all have
  read it.

Sums are taken in the order of ranks, element by element: the same bits at all ranks, however large a tensor is.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import accumulate

import torch
from torch import Tensor

from resilin.memory.pages import Handle, Pages, PagesError, spares
from resilin.parallel.lines import Kind, Line, NeighbourError, Said
from resilin.parallel.meeting import Met

_SMALL = 1 << 16  # bytes of a sum that every rank takes in whole; of larger ones each takes a part, among three or more
_ALIGNED = 64
_LEAVING, _POLL = 5.0, 0.001  # seconds that whoever leaves waits for its letters to be read, and between two looks
_HALVES = (torch.bfloat16, torch.float16)


@dataclass(eq=False, slots=True)
class _Box:
    """Pages for one letter at a time.

    Attributes:
        pages: where it lies.
        readers: who has yet to read it, as a number of ranks.
        known: ranks that have mapped the pages.
    """

    pages: Pages
    readers: int = 0
    known: set[int] = field(default_factory=set)

    @property
    def size(self) -> int:
        """In bytes."""
        return len(self.pages.data)


class Neighbours:
    """A group on one machine, as one of its ranks sees it.

    All of its methods but `post` and `receive` are called by all ranks together, in the same order; by one thread.

    Args:
        index: which rank this is.
        met: lines to the others, and everyone's room.

    Attributes:
        size: how many ranks.
    """

    def __init__(self, index: int, met: Met) -> None:
        lines, rooms = met
        self.index, self.size = index, len(rooms)
        # Whoever comes next hears first, so that not all wake the same one.
        others = [(index + step) % self.size for step in range(1, self.size)]
        self._lines: dict[int, Line] = {rank: line for rank in others if (line := lines[rank]) is not None}
        self._rooms: list[Pages] = rooms
        self._shown, self._grown = 0, False
        self._later = 0
        self._boxes: list[_Box] = []
        self._theirs: dict[tuple[int, int], Pages] = {}
        self._kept: list[Pages] = []  # of others, mapped until this ends: whoever lets go of them need not unmap them
        weakref.finalize(self, _close, list(self._lines.values()), self._boxes)

    # -- rooms --------------------------------------------------------------------------------------------------

    def room(self, size: int) -> Tensor:
        """(size,) uint8 of this rank to fill, which `show` shows next."""
        if size > len(self._half(self.index)):
            self._rooms[self.index], self._grown = spares.take(2 * (size + _ALIGNED)), True
        return self._half(self.index)[:size]

    def _half(self, rank: int) -> Tensor:
        data = self._rooms[rank].data
        half = len(data) // (2 * _ALIGNED) * _ALIGNED
        return data[self._shown % 2 * half :][:half]

    def show(self) -> list[Tensor]:
        """Everyone's rooms, as bytes, once all are filled; to be read until the next call of `show`.

        Raises:
            NeighbourError: a rank is gone, or has not come in time.
        """
        said = Said(Kind.SHOWN, self._shown)
        if self._grown:
            handle = self._rooms[self.index].handle
            if handle is None:
                raise NeighbourError("this process has no more memory that others can map")
            said, self._grown = said._replace(handle=tuple(handle.json())), False
        for line in self._lines.values():
            line.say(said)
        news = said.is_new
        for rank, line in self._lines.items():
            heard = line.hear(Kind.SHOWN, self._shown)
            if heard.is_new:
                self._rooms[rank], news = self._mapped(heard.handle, rank), True
        found = [self._half(rank) for rank in range(self.size)]
        self._shown += 1
        if news:  # whoever has larger pages keeps them until all have mapped them
            self._meet()
        return found

    def _meet(self) -> None:
        for line in self._lines.values():
            line.say(Said(Kind.SHOWN, -1))
        for line in self._lines.values():
            line.hear(Kind.SHOWN, -1)

    def _mapped(self, handle: Sequence[int], rank: int) -> Pages:
        try:
            return Pages.mapped(Handle.of_json(list(handle)))
        except PagesError as error:  # others could be mapped when the group was made: their owner is gone
            raise NeighbourError(f"the memory of rank {rank} of a group is gone: {error}") from None

    def _show(self, x: Tensor) -> list[Tensor]:
        """Everyone's tensor of the same shape and format."""
        x = x.detach()
        room = self.room(x.nbytes)
        room.view(x.dtype).view(x.shape).copy_(x)
        return [data[: x.nbytes].view(x.dtype).view(x.shape) for data in self.show()]

    def tell(self, raw: bytes) -> list[bytes]:
        """What every rank says, of any length."""
        room = self.room(8 + len(raw))
        room[:8].view(torch.int64)[0] = len(raw)
        if raw:
            room[8:].copy_(torch.frombuffer(bytearray(raw), dtype=torch.uint8))
        return [data[8:][: int(data[:8].view(torch.int64))].numpy().tobytes() for data in self.show()]

    def map_all(self, pages: Pages) -> list[Tensor] | None:
        """Everyone's pages, this rank's own among them; None where some rank has none that others can map."""
        told = self._show(torch.tensor([0] * 5 if pages.handle is None else pages.handle.json()))
        handles = [one.tolist() for one in told]
        if not all(any(handle) for handle in handles):
            return None
        found = [pages if rank == self.index else self._mapped(handle, rank) for rank, handle in enumerate(handles)]
        self._kept += found
        self._meet()
        return [each.data for each in found]

    def touch(self) -> None:
        """Have all of the room's memory ready: where there are fewer ranks each has more to show."""
        room = self._rooms[self.index]
        room.touch(len(room.data))

    def give_up(self) -> None:
        """Leave the room to whoever needs memory next: all ranks have come out of whatever they did together."""
        spares.give(self._rooms[self.index])

    # -- collectives --------------------------------------------------------------------------------------------

    def sum(self, x: Tensor) -> Tensor:
        """The sum of everyone's tensor, a new one."""
        if self.size > 2 and x.nbytes > _SMALL:
            parts = [part.reshape(-1).tensor_split(self.size) for part in self._show(x)]
            sizes = [part.nbytes for part in parts[0]]
            own = _added([part[self.index] for part in parts])
            self.room(own.nbytes).view(x.dtype).copy_(own)
            return torch.cat([d[:size].view(x.dtype) for d, size in zip(self.show(), sizes, strict=True)]).view(x.shape)
        return _added(self._show(x))

    def largest(self, x: Tensor) -> Tensor:
        """The largest of everyone's, element by element; a new tensor."""
        first, *others = self._show(x)
        found = first.clone()
        for other in others:
            torch.maximum(found, other, out=found)
        return found

    def gather(self, x: Tensor, dim: int) -> Tensor:
        """Everyone's tensors of one shape side by side along a dimension."""
        parts = self._show(x)
        parts[self.index] = x.detach()
        return torch.cat(parts, dim)

    def stack(self, x: Tensor) -> Tensor:
        """(P, *) everyone's tensors of one shape."""
        return torch.stack(self._show(x))

    def scatter_sum(self, x: Tensor, dim: int) -> Tensor:
        """This rank's part, along a dimension, of the sum of everyone's; a new tensor."""
        given = x.detach().unflatten(dim, (self.size, -1)).movedim(dim, 0)
        room = self.room(x.nbytes).view(x.dtype).view(given.shape)
        for rank in range(self.size):
            if rank != self.index:
                room[rank].copy_(given[rank])
        shown = [data[: x.nbytes].view(x.dtype).view(given.shape)[self.index] for data in self.show()]
        shown[self.index] = given[self.index]
        return _added(shown)

    def swap(self, rows: Tensor, sent: Sequence[int], received: Sequence[int]) -> Tensor:
        """Rows from every rank to every rank.

        Args:
            rows: (sum of sent, *) by receiver.
            sent: rows for each rank.
            received: rows from each rank.

        Returns:
            (sum of received, *) by sender; a new tensor.
        """
        rows = rows.detach()
        each = rows.element_size() * rows[:1].numel() if len(rows) else 0
        begins = [begin * each for begin in accumulate(sent, initial=0)]
        head = -(-8 * len(begins) // _ALIGNED) * _ALIGNED
        room = self.room(head + rows.nbytes)
        room[: 8 * len(begins)].view(torch.int64).copy_(torch.tensor(begins))
        room[head:].view(rows.dtype).view(rows.shape).copy_(rows)
        own = rows[sum(sent[: self.index]) : sum(sent[: self.index + 1])]
        found = []
        for rank, (data, count) in enumerate(zip(self.show(), received, strict=True)):
            if rank == self.index:
                found.append(own)
                continue
            begin, end = data[8 * self.index : 8 * (self.index + 2)].view(torch.int64).tolist()
            part = data[head + begin : head + end].view(rows.dtype).view(-1, *rows.shape[1:]) if count else rows[:0]
            if len(part) != count:
                raise ValueError(f"{count} rows were to come from rank {rank} of a group, and {len(part)} did")
            found.append(part)
        return torch.cat(found)

    # -- letters ------------------------------------------------------------------------------------------------

    def post(self, x: Tensor, to: Sequence[int], tag: int) -> None:
        """Leave a tensor for other ranks; it may change at once.

        Args:
            x: of any shape, not empty.
            to: the ranks.
            tag: by which they ask for it, 0 or more; those of one tag come in order.
        """
        number, box = self._free(x.nbytes)
        box.pages.data[: x.nbytes].view(x.dtype).view(x.shape).copy_(x.detach())
        box.readers = len(to)
        said = Said(Kind.LETTER, tag, number, x.nbytes)
        for rank in to:
            handle = box.pages.handle
            if rank not in box.known and handle is not None:
                box.known.add(rank)
                self._lines[rank].say(said._replace(handle=tuple(handle.json())))
            else:
                self._lines[rank].say(said)

    def _free(self, size: int) -> tuple[int, _Box]:
        """A box of at least so many bytes that nobody reads; its number."""
        for looked in (False, True):
            if looked:
                for line in self._lines.values():
                    with suppress(NeighbourError):  # who has left reads nothing; whoever is needed is missed elsewhere
                        _look(line, self._boxes)
            found = [number for number, box in enumerate(self._boxes) if not box.readers and size <= box.size]
            if found:
                number = min(found, key=lambda one: self._boxes[one].size)
                return number, self._boxes[number]
        box = _Box(Pages.of(size))
        if box.pages.handle is None:
            raise NeighbourError("this process has no more memory that others can map")
        self._boxes.append(box)
        return len(self._boxes) - 1, box

    def receive(self, into: Tensor, by: int, tag: int) -> None:
        """Fill a tensor with what another rank has left; waits for it.

        Args:
            into: as large as what was posted, and of its format.
            by: who posted it.
            tag: with which.
        """
        line = self._lines[by]
        heard = line.hear(Kind.LETTER, tag)
        place = (by, heard.box)
        if heard.is_new:
            self._theirs[place] = self._mapped(heard.handle, by)
        if heard.size != into.nbytes:
            raise ValueError(f"{into.nbytes} bytes were to come from rank {by} of a group, and {heard.size} did")
        into.copy_(self._theirs[place].data[: heard.size].view(into.dtype).view(into.shape))
        with suppress(NeighbourError):  # who has left needs no box any more
            line.say(Said(Kind.TAKEN, tag, heard.box))

    def swap_later(
        self, received: Tensor, sent: Tensor, gets: Sequence[int], gives: Sequence[int]
    ) -> Callable[[], None]:
        """As `swap`, of flat tensors; gives what waits for it, so that something else may be done meanwhile."""
        tag = self._next_later()
        came, parts = received.split(list(gets)), sent.split(list(gives))
        for rank in self._lines:
            if gives[rank]:
                self.post(parts[rank], (rank,), tag)
        came[self.index].copy_(parts[self.index])

        def wait() -> None:
            for rank in self._lines:
                if gets[rank]:
                    self.receive(came[rank], rank, tag)

        return wait

    def share_later(self, parts: Sequence[Tensor]) -> Callable[[], None]:
        """Everyone's part to all; gives what waits until those of others are filled."""
        tag = self._next_later()
        if parts[self.index].numel():
            self.post(parts[self.index], tuple(self._lines), tag)

        def wait() -> None:
            for rank in self._lines:
                if parts[rank].numel():
                    self.receive(parts[rank], rank, tag)

        return wait

    def _next_later(self) -> int:
        """A tag that no caller of `post` gives."""
        self._later -= 1
        return self._later


def _added(parts: Sequence[Tensor]) -> Tensor:
    """The sum in order; of three or more halves, rounded once."""
    if len(parts) > 2 and parts[0].dtype in _HALVES:
        wide = parts[0].float()
        for part in parts[1:]:
            wide += part
        return wide.to(parts[0].dtype)
    total = torch.add(parts[0], parts[1])
    for part in parts[2:]:
        total += part
    return total


def _look(line: Line, boxes: Sequence[_Box]) -> None:
    """Hear which letters were read at the other end."""
    line.look()
    for number in line.taken:
        boxes[number].readers -= 1
    line.taken.clear()


def _close(lines: Sequence[Line], boxes: Sequence[_Box]) -> None:
    """Leave, once what was posted is read: its memory goes with this process."""
    there, until = list(lines), time.monotonic() + _LEAVING
    while there and any(box.readers for box in boxes) and time.monotonic() < until:
        for line in list(there):
            try:
                _look(line, boxes)
            except NeighbourError:  # it has left, or the links were cut
                there.remove(line)
        time.sleep(_POLL)
    for line in lines:
        line.close()
