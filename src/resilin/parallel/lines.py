"""Connections between the processes of a group on one machine, over which they say what lies where in shared memory.

What is said has one size, and travels over loopback TCP: whoever waits sleeps in the system and is woken once, by the
one it waits for, with no thread of a backend between them; a connection ends with the process at its other end, however
that ended, and can be ended by any thread of this one.
"""

from __future__ import annotations

import socket
import struct
from collections import deque
from enum import IntEnum
from typing import NamedTuple

import torch.distributed as dist

_FORMAT = struct.Struct("<9q")
_NO_HANDLE = (0,) * 5


class NeighbourError(dist.DistNetworkError):
    """A worker of this machine is gone, or has not come in time."""


class Kind(IntEnum):
    """What is said."""

    SHOWN = 0
    """Something lies in my room."""
    LETTER = 1
    """A letter for you lies in one of my boxes."""
    TAKEN = 2
    """I have read a letter of yours."""


class Said(NamedTuple):
    """One message.

    Attributes:
        kind: what is said.
        tag: which of its kind.
        box: of letters, where it lies; else 0.
        size: in bytes.
        handle: of pages that are new to who hears it; zeros: there are none.
    """

    kind: int
    tag: int
    box: int = 0
    size: int = 0
    handle: tuple[int, ...] = _NO_HANDLE

    @property
    def is_new(self) -> bool:
        """Whether there are new pages to be mapped."""
        return self.handle != _NO_HANDLE


class Line:
    """To one process of the group.

    Args:
        connection: a connected socket, which is this object's from now on.
        rank: who is at its other end, for errors.
        timeout: seconds that whoever waits waits.

    Attributes:
        taken: boxes whose letters the other has read, to be emptied by whoever looks.
    """

    def __init__(self, connection: socket.socket, rank: int, timeout: float) -> None:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        span = struct.pack("ll", int(timeout), int(timeout % 1 * 1e6))
        for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):  # by the system: no look at the clock between
            connection.setsockopt(socket.SOL_SOCKET, option, span)
        self._connection, self._rank, self._timeout = connection, rank, timeout
        self._buffer, self._filled = memoryview(bytearray(_FORMAT.size)), 0
        self._heard: dict[tuple[int, int], deque[Said]] = {}
        self.taken: list[int] = []

    def say(self, said: Said) -> None:
        """Send it.

        Raises:
            NeighbourError: the other is gone, or hears nothing for so long that there is no more room.
        """
        kind, tag, box, size, handle = said
        try:
            self._connection.sendall(_FORMAT.pack(kind, tag, box, size, *handle))
        except OSError as error:
            raise self._lost(error) from None

    def hear(self, kind: Kind, tag: int) -> Said:
        """The next of a kind and tag; waits for it.

        Raises:
            NeighbourError: the other is gone, or has not said so in time.
        """
        wanted = (int(kind), tag)
        while not (queue := self._heard.get(wanted)):
            self._next(socket.MSG_WAITALL)
        said = queue.popleft()
        if not queue:
            del self._heard[wanted]
        return said

    def look(self) -> None:
        """Take what has been said so far, without waiting."""
        while self._next(socket.MSG_DONTWAIT):
            pass

    def _next(self, flags: int) -> bool:
        """Read one message; whether there was one."""
        while self._filled < _FORMAT.size:
            try:
                more = self._connection.recv_into(self._buffer[self._filled :], 0, flags)
            except BlockingIOError:
                if flags & socket.MSG_DONTWAIT:
                    return False
                raise NeighbourError(
                    f"timed out: worker {self._rank} has said nothing for {self._timeout:g} s"
                ) from None
            except OSError as error:
                raise self._lost(error) from None
            if not more:
                raise self._lost(None)
            self._filled += more
        self._filled = 0
        kind, tag, box, size, *handle = _FORMAT.unpack(self._buffer)
        if kind == Kind.TAKEN:
            self.taken.append(box)
        else:
            self._heard.setdefault((kind, tag), deque()).append(Said(kind, tag, box, size, tuple(handle)))
        return True

    def _lost(self, error: OSError | None) -> NeighbourError:
        if isinstance(error, BlockingIOError):
            return NeighbourError(f"timed out: worker {self._rank} has heard nothing for {self._timeout:g} s")
        return NeighbourError(f"the connection to worker {self._rank} was ended" + (f": {error}" if error else ""))

    def close(self) -> None:
        """End it."""
        self._connection.close()
