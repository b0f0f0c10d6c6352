"""Memory that outlasts the process that filled it: copies of states which another process of the same machine keeps.

Between machines a copy is sent. On one machine nothing has to be: whoever holds it maps the same pages, and they stay
as long as anyone maps them, however the process that made them ended (SIGKILL too). So the moment in which a member's
newest states exist only once is as long as it takes to write them down, and no processor time goes into moving them.
What is lost with a machine is lost either way; holders are on other machines where there are any.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import threading
import weakref
from bisect import insort
from contextlib import suppress
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_NAME = "resilin-copy"
_ALIGNED = 64
_STRETCH = 1 << 20
_POPULATE = 23  # MADV_POPULATE_WRITE, of Linux 5.14 and later; Python has no name for it
_SEALS = getattr(fcntl, "F_SEAL_SHRINK", 0) | getattr(fcntl, "F_SEAL_GROW", 0)


class PagesError(RuntimeError):
    """Another process's pages cannot be mapped here."""


@dataclass(frozen=True, slots=True)
class Handle:
    """How a process of the same user on the same machine finds pages.

    Attributes:
        process: whose they are.
        descriptor: its number for them.
        device: of the file that they are.
        inode: of the file; with the device it tells whether what is found is what was meant.
        bytes: how many.
    """

    process: int
    descriptor: int
    device: int
    inode: int
    bytes: int

    def json(self) -> list[int]:
        """As JSON values."""
        return list(astuple(self))

    @classmethod
    def of_json(cls, told: Any) -> Handle:
        """From what `json` gave.

        Raises:
            PagesError: it is something else.
        """
        if not isinstance(told, list) or len(told) != 5 or any(type(one) is not int or one < 0 for one in told):
            raise PagesError(f"this is no handle of pages: {told!r:.100}")
        return cls(*told)


class Pages:
    """A piece of host memory.

    Attributes:
        data: (bytes,) uint8.
        handle: with which others map it; None: this system has no such memory, and it is this process's alone.
        own: whether this process made it, and may fill it anew.
        laid_out: what lies in it, and views of that, for whoever fills it anew with the like.
    """

    def __init__(
        self, data: Tensor, handle: Handle | None = None, *, own: bool = True, mapping: mmap.mmap | None = None
    ) -> None:
        self.data, self.handle, self.own, self._mapping = data, handle, own, mapping
        self.laid_out: tuple[object, list[Tensor]] | None = None

    @classmethod
    def of(cls, size: int) -> Pages:
        """New ones, of so many bytes."""
        if not size or not hasattr(os, "memfd_create"):
            return cls(torch.empty(size, dtype=torch.uint8))
        try:
            file = os.memfd_create(_NAME, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        except OSError:  # a sandbox may forbid it
            return cls(torch.empty(size, dtype=torch.uint8))
        try:
            os.ftruncate(file, size)
            fcntl.fcntl(file, fcntl.F_ADD_SEALS, _SEALS)  # whoever maps them will not find them gone
            mapping = mmap.mmap(file, size)
            facts = os.fstat(file)
        except BaseException:
            os.close(file)
            raise
        data = torch.frombuffer(mapping, dtype=torch.uint8)
        made = cls(data, Handle(os.getpid(), file, facts.st_dev, facts.st_ino, size), mapping=mapping)
        weakref.finalize(made, os.close, file)
        return made

    @classmethod
    def alone(cls, size: int) -> Pages:
        """New ones that nobody else can map; large ones, where the system has them."""
        if not size or not hasattr(mmap, "MADV_HUGEPAGE"):
            return cls(torch.empty(size, dtype=torch.uint8))
        mapping = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with suppress(OSError):
            mapping.madvise(mmap.MADV_HUGEPAGE)
        return cls(torch.frombuffer(mapping, dtype=torch.uint8), mapping=mapping)

    @classmethod
    def mapped(cls, handle: Handle) -> Pages:
        """Those of another process, or of this one.

        Raises:
            PagesError: it is on another machine, or in another container, or of another user, or gone.
        """
        path = f"/proc/{handle.process}/fd/{handle.descriptor}"
        try:
            named = Path(path).readlink()
            if not str(named).startswith(f"/memfd:{_NAME}"):  # nothing else is opened
                raise PagesError(f"{path} is {named}, and no copy")
            file = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            raise PagesError(f"{path} cannot be opened: {error}") from None
        try:
            facts, seals = os.fstat(file), fcntl.fcntl(file, fcntl.F_GET_SEALS)
            if (facts.st_dev, facts.st_ino, facts.st_size) != (handle.device, handle.inode, handle.bytes):
                raise PagesError(f"{path} is another copy than the one that was meant")
            if seals & _SEALS != _SEALS:
                raise PagesError(f"{path} could be cut off by whoever made it")
            mapping = mmap.mmap(file, handle.bytes)
            return cls(torch.frombuffer(mapping, dtype=torch.uint8), handle, own=False, mapping=mapping)
        except OSError as error:
            raise PagesError(f"{path} cannot be mapped: {error}") from None
        finally:
            os.close(file)

    def touch(self, size: int) -> None:
        """Have the system clear and map the first so many bytes before they are used; what is in them stays.

        It does so for each page at its first use otherwise, which takes several times as long as copying into it. An
        older system cannot be told.
        """
        size = min(size, len(self.data))
        if self._mapping is not None:
            with suppress(OSError):
                for begin in range(0, size, _STRETCH):  # Python lets no other thread go on meanwhile
                    self._mapping.madvise(_POPULATE, begin, min(_STRETCH, size - begin))


class Spares:
    """Pages that nobody uses any more, kept for who needs some next.

    The system clears each page at its first use, which takes several times as long as copying into it.

    Args:
        most: pieces that are kept.
        shown: whether others can map them; else they are this process's alone, and may be large pages, which few
            systems have for what is shown.
    """

    def __init__(self, most: int = 3, *, shown: bool = True) -> None:
        self._most, self._shown = most, shown
        self._lock = threading.Lock()
        self._free: list[Pages] = []

    def take(self, size: int) -> Pages:
        """Of so many bytes at least, with anything in them: the smallest that are there, or new ones.

        New ones have room for twice as much, for whoever needs more next time: pages that are never written to cost
        nothing.
        """
        with self._lock:
            for place, pages in enumerate(self._free):
                if size <= len(pages.data):
                    return self._free.pop(place)
        room = 2 * -(-size // _ALIGNED) * _ALIGNED  # for elements of every format
        return Pages.of(room) if self._shown else Pages.alone(room)

    def give(self, pages: Pages) -> None:
        """Whoever else has mapped them reads them no more."""
        if pages.own and (pages.handle is not None or not self._shown):
            with self._lock:
                insort(self._free, pages, key=lambda one: len(one.data))
                del self._free[: -self._most]


spares = Spares()
"""Of this process: what groups and engines of one view leave to those of the next."""
