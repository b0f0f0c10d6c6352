"""The job's store for workers on other machines.

Torch's store knows no secret, so it listens on the coordinator's loopback only, and is reached through connections to
the coordinator, who does.

At a worker a relay listens on the loopback; every connection to it becomes one to the coordinator, which makes one to
the store. Bytes are passed on as they are.
"""

from __future__ import annotations

import selectors
import socket
from contextlib import suppress
from typing import Any

from resilin.cluster.accepting import accept_each
from resilin.cluster.addresses import LOOPBACK
from resilin.cluster.handshake import HandshakeError, prove
from resilin.cluster.starter import Door
from resilin.cluster.wire import Wire

_SIZE = 1 << 16


def join(one: socket.socket, other: socket.socket) -> None:
    """Pass on what either says to the other, until one has ended; then both are closed."""
    with one, other, suppress(OSError), selectors.DefaultSelector() as either:
        either.register(one, selectors.EVENT_READ, other)
        either.register(other, selectors.EVENT_READ, one)
        while True:
            for ready, _ in either.select():
                said_by: Any = ready.fileobj
                piece = said_by.recv(_SIZE)
                if not piece:
                    return
                ready.data.sendall(piece)


def serve(connection: socket.socket, wire: Wire, store: int) -> None:
    """At the coordinator: one connection that was admitted becomes one to the store, until it ends.

    Args:
        connection: whose other end has asked for it.
        wire: of it, on which that was said.
        store: its port on the loopback.
    """
    with suppress(OSError), socket.create_connection((LOOPBACK, store), 10) as inside:
        inside.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        inside.settimeout(None)
        wire.say({"ok": True})
        join(connection, inside)


class Relay:
    """At a worker: a port of the loopback that leads to the store.

    Args:
        door: of the job.
        timeout: seconds that connecting may take.
    """

    def __init__(self, door: Door, timeout: float) -> None:
        self._door, self._timeout = door, timeout
        self._listening = socket.create_server((LOOPBACK, 0))
        self.port = int(self._listening.getsockname()[1])
        accept_each(self._listening, self._relay, "resilin-tunnel")

    def _relay(self, inside: socket.socket) -> None:
        with inside, suppress(OSError, HandshakeError):
            inside.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            outside = socket.create_connection((self._door.host, self._door.port), self._timeout)
            with outside:
                prove(outside, self._door.secret)
                wire = Wire(outside)
                wire.say({"store": True})
                if (wire.hear() or {}).get("ok"):
                    join(inside, outside)

    def close(self) -> None:
        """Listen no more; connections end with their users."""
        with suppress(OSError):
            self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()
