"""Listening: every connection to a socket goes to a function, in a thread of its own."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable

from resilin.cluster.handshake import HandshakeError, admit
from resilin.cluster.scheduling import answer_at_once


def accept_each(listening: socket.socket, serve: Callable[[socket.socket], object], name: str) -> None:
    """Begin to accept, until the socket is closed.

    Args:
        listening: a socket that does.
        serve: given each connection; it closes it.
        name: of the threads.
    """

    def served(connection: socket.socket) -> None:
        answer_at_once()
        serve(connection)

    def accept() -> None:
        answer_at_once()
        while True:
            try:
                connection, _ = listening.accept()
            except OSError:
                return
            threading.Thread(target=served, args=(connection,), name=name, daemon=True).start()

    threading.Thread(target=accept, name=f"{name}s", daemon=True).start()


def admitted(connection: socket.socket, secret: str) -> bool:
    """Whether the other end knows the secret of the job; else the connection is closed."""
    try:
        admit(connection, secret)
    except HandshakeError:
        connection.close()
        return False
    return True
