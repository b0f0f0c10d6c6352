"""Copies of members' states in host memory: each member's own, and those it keeps for others (ElasWave, section 7).

Of every owner the last two versions that are complete are kept. A third is taken only once it is whole, so a failure in
the middle never costs the only good one. A change of the view changes who owns what: copies made under the old view are
kept, beside those of the new one, until these are known to be everywhere (`forget`).
"""

from __future__ import annotations

import threading
from bisect import insort
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from resilin.checkpoint.tensor_record import DTYPE_NAMES, DTYPES
from resilin.cluster.checksum import RunningSum, checksum
from resilin.memory.pages import Pages

KEPT = 2
_SPARE = 4
_ALIGN = 64
_STRETCH = 1 << 18  # bytes


class CopyError(RuntimeError):
    """A copy of states is missing, or is not what was sent."""


@dataclass(frozen=True, slots=True)
class Slot:
    """One tensor of a copy.

    Attributes:
        parameter: whose it is; "" where it is of none.
        path: where it stands in the state, the parameter's name left out: "weights", "optimizer/parameters/{}/exp_avg".
        dtype: as in checkpoints.
        shape: of the tensor.
        start: its first byte.
        bytes: how many.
    """

    parameter: str
    path: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    bytes: int


@dataclass(frozen=True)
class Copy:
    """The states that one member owns, at one version.

    Attributes:
        owner: its number.
        epoch: of the view under which it owns them.
        version: steps committed.
        slots: what is where in `data`.
        rest: JSON values that belong to it.
        bytes: of its data.
        pages: host memory, of so many bytes at least, which begins with the data.
        sum: `checksum` of the data.
    """

    owner: int
    epoch: int
    version: int
    slots: tuple[Slot, ...]
    rest: Any
    bytes: int
    pages: Pages
    sum: int

    @property
    def data(self) -> Tensor:
        """(bytes,) uint8."""
        return self.pages.data[: self.bytes]

    def tensor(self, slot: Slot) -> Tensor:
        """A view of one tensor."""
        return self.data[slot.start : slot.start + slot.bytes].view(DTYPES[slot.dtype]).view(slot.shape)

    def head(self, like: tuple[Slot, ...] | None = None) -> dict[str, Any]:
        """All but the data, as JSON values.

        Args:
            like: slots that whoever hears it has: where they are the same they are left out.
        """
        head: dict[str, Any] = {
            "owner": self.owner,
            "epoch": self.epoch,
            "version": self.version,
            "rest": self.rest,
            "bytes": self.bytes,
            "sum": self.sum,
        }
        if self.slots != like:
            head["slots"] = [[s.parameter, s.path, s.dtype, list(s.shape), s.start, s.bytes] for s in self.slots]
        return head

    @classmethod
    def of_head(cls, head: dict[str, Any], pages: Pages, like: tuple[Slot, ...] | None = None) -> Copy:
        """From a head and the data that came with it. The sum is not compared yet: see `check`.

        Args:
            head: see `head`.
            pages: with the data.
            like: the slots of a head without any.

        Raises:
            CopyError: there are fewer bytes than the head says, or it is none.
        """
        try:
            slots = slots_of(head) if like is None or "slots" in head else like
            owner, epoch, version = int(head["owner"]), int(head["epoch"]), int(head["version"])
            made = cls(owner, epoch, version, slots, head["rest"], int(head["bytes"]), pages, int(head["sum"]))
        except (KeyError, TypeError, ValueError) as error:
            raise CopyError(f"this is no head of a copy: {head!r:.200} ({type(error).__name__}: {error})") from None
        there = pages.data.numel()
        if there < made.bytes or any(s.start < 0 or s.start + s.bytes > made.bytes for s in slots):
            raise CopyError(f"member {made.owner}'s states of version {made.version}: {there} of {made.bytes} bytes")
        return made

    def check(self) -> None:
        """Compare the data with its sum.

        Raises:
            CopyError: they differ.
        """
        found = checksum(self.data)
        if found != self.sum:
            raise CopyError(
                f"the copy of member {self.owner}'s states of version {self.version} is damaged: its sum is "
                f"{found:016x}, it was made with {self.sum:016x}; nothing is trained on it"
            )


def slots_of(head: dict[str, Any]) -> tuple[Slot, ...]:
    """Of what `Copy.head` gave."""
    return tuple(
        Slot(str(p), str(path), str(dtype), tuple(map(int, shape)), int(start), int(size))
        for p, path, dtype, shape, start, size in head["slots"]
    )


class Pool:
    """The copies in one member's memory. Any thread may ask.

    Args:
        member: whose memory.
    """

    def __init__(self, member: int) -> None:
        self.member = member
        self._lock = threading.Lock()
        self._copies: dict[tuple[int, int], dict[int, Copy]] = {}  # by owner and epoch
        self._free: list[Pages] = []

    def memory(self, size: int) -> Pages:
        """Memory for so many bytes at least: that of a version which is no longer kept, where one fits."""
        with self._lock:
            self._free = [old for old in self._free if old.data.numel() <= 4 * size]  # what is owned has become less
            for place, old in enumerate(self._free):
                if size <= old.data.numel():
                    return self._free.pop(place)
        return Pages.of(size + size // 8)  # states may grow a little; pages that are never written to cost nothing

    def reserve(self, size: int) -> None:
        """See to it that `memory` has so much at once, without pages that are written to for the first time.

        The system clears each page at its first use, which takes several times as long as copying into it. Whoever is
        left after a loss owns more than before, and everyone waits for its first copy of that.
        """
        with self._lock:
            if any(size <= old.data.numel() for old in self._free):
                return
        pages = Pages.of(size)
        pages.data.zero_()
        with self._lock:
            self._keep(pages)

    def _keep(self, pages: Pages) -> None:
        """Memory that is free now; the smallest first, the largest few."""
        if pages.own:
            insort(self._free, pages, key=lambda one: one.data.numel())
            del self._free[:-_SPARE]

    def put(self, copy: Copy) -> None:
        """Keep a complete copy; of this owner's others of the epoch the newest `KEPT - 1` stay."""
        with self._lock:
            mine = self._copies.setdefault((copy.owner, copy.epoch), {})
            mine[copy.version] = copy
            for version in sorted(mine)[:-KEPT]:
                self._keep(mine.pop(version).pages)

    def get(self, owner: int, epoch: int, version: int) -> Copy:
        """A copy.

        Raises:
            CopyError: it is not here.
        """
        with self._lock:
            found = self._copies.get((owner, epoch), {}).get(version)
        if found is None:
            raise CopyError(
                f"member {self.member} has no copy of member {owner}'s states of epoch {epoch}, version {version}; it "
                f"has {self.versions()}"
            )
        return found

    def versions(self) -> dict[tuple[int, int], list[int]]:
        """By owner and epoch the versions that are here, ascending."""
        with self._lock:
            return {key: sorted(versions) for key, versions in self._copies.items() if versions}

    def forget(self, epoch: int) -> None:
        """Drop copies of epochs before this one."""
        with self._lock:
            for key in [key for key in self._copies if key[1] < epoch]:
                for copy in self._copies.pop(key).values():
                    self._keep(copy.pages)


def copy_of(
    owner: int, epoch: int, version: int, tensors: list[tuple[str, str, Tensor]], rest: Any, pool: Pool | None = None
) -> Copy:
    """A copy of tensors as they are now.

    Args:
        owner: whose they are.
        epoch: of the view.
        version: of the states.
        tensors: (parameter, path, tensor), see `Slot`.
        rest: JSON values.
        pool: whose free memory is used.
    """
    slots, size = [], 0
    for parameter, path, tensor in tensors:
        slots.append(Slot(parameter, path, DTYPE_NAMES[tensor.dtype], tuple(tensor.shape), size, tensor.nbytes))
        size += -(-tensor.nbytes // _ALIGN) * _ALIGN
    pages = Pages.of(size) if pool is None else pool.memory(size)
    data = pages.data[:size]
    views = _places(pages, tuple(slots), data)
    return Copy(owner, epoch, version, tuple(slots), rest, size, pages, _fill(data, slots, views, tensors))


def _fill(
    data: Tensor, slots: Sequence[Slot], views: Sequence[Tensor], tensors: Sequence[tuple[str, str, Tensor]]
) -> int:
    """Copy tensors to where they go, and take the sum of it all a stretch at a time, while that is near the core."""
    total, done = RunningSum(data), 0
    targets: list[Tensor] = []
    given: list[Tensor] = []

    def copy_up_to(end: int) -> int:
        torch._foreach_copy_(targets, given)
        targets.clear()
        given.clear()
        total.up_to(end)
        return end

    for slot, view, (_, _, tensor) in zip(slots, views, tensors, strict=True):
        parts, values = [view], [tensor.detach()]
        if slot.bytes > 2 * _STRETCH and tensor.is_contiguous():
            parts, values = (list(one.view(-1).split(_STRETCH // one.element_size())) for one in (view, values[0]))
        end = slot.start
        for part, value in zip(parts, values, strict=True):
            targets.append(part)
            given.append(value)
            end += part.nbytes
            if end - done >= _STRETCH:
                done = copy_up_to(end)
    if targets:
        copy_up_to(len(data))
    return total.up_to(len(data))


def _places(pages: Pages, slots: tuple[Slot, ...], data: Tensor) -> list[Tensor]:
    """Where tensors go, and zeros between them, which are part of the sum; mostly those of an earlier version."""
    if pages.laid_out is None or pages.laid_out[0] != slots:
        views, end = [], 0
        for slot in slots:
            data[end : slot.start].zero_()
            end = slot.start + slot.bytes
            views.append(data[slot.start : end].view(DTYPES[slot.dtype]).view(slot.shape))
        data[end:].zero_()
        pages.laid_out = slots, views
    return pages.laid_out[1]
