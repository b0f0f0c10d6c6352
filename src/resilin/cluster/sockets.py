"""The sockets of this process, whoever has made them: torch's own are of no Python object."""

from __future__ import annotations

import os
import socket
import stat
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

At = tuple[str, int]
"""An address and a port."""


@dataclass(frozen=True, slots=True)
class Socket:
    """One of them, as it was when it was looked at.

    Attributes:
        number: its descriptor.
        inode: what it is: the number may be another one's since.
        listens: whether it waits for connections.
        own: where it is.
        other: where its other end is; None: it has none.
    """

    number: int
    inode: int
    listens: bool
    own: At
    other: At | None


def internet_sockets() -> list[Socket]:
    """All stream sockets that are connected, or listen, over IPv4 or IPv6."""
    found = []
    for entry in Path("/dev/fd").iterdir():
        number = int(entry.name)
        with suppress(OSError):
            status = os.fstat(number)
            if stat.S_ISSOCK(status.st_mode):
                with opened(number) as same:
                    if same.family in (socket.AF_INET, socket.AF_INET6) and same.type == socket.SOCK_STREAM:
                        listens = bool(same.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))
                        found.append(Socket(number, status.st_ino, listens, at_of(same.getsockname()), _other(same)))
    return found


def opened(number: int, inode: int | None = None) -> socket.socket:
    """A socket by its descriptor, as an object of its own, which has to be closed.

    Args:
        number: the descriptor.
        inode: that it had; None: any.

    Raises:
        OSError: there is none, or it is another one by now.
    """
    copied = os.dup(number)
    try:
        if inode is not None and os.fstat(copied).st_ino != inode:
            raise OSError(f"descriptor {number} is another socket by now")
        return socket.socket(fileno=copied)
    except OSError:
        os.close(copied)
        raise


def _other(connection: socket.socket) -> At | None:
    try:
        return at_of(connection.getpeername())
    except OSError:
        return None


def at_of(address: tuple[object, ...]) -> At:
    """An address as `socket` gives it."""
    return str(address[0]).removeprefix("::ffff:"), int(str(address[1]))
