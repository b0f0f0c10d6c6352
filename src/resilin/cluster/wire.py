"""A line of JSON after the other over a socket, between members and the coordinator."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from resilin.cluster.isolation import hold, release

_LINE = 1 << 26  # bytes


class Wire:
    """One end of a connection. One thread hears, any may say.

    Args:
        connection: of a stream.
    """

    def __init__(self, connection: socket.socket) -> None:
        with suppress(OSError):  # a socket pair of this machine has no such option
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._connection = connection
        self._read: Any = connection.makefile("rb")
        self._lock = threading.Lock()

    def say(self, message: Mapping[str, Any]) -> bool:
        """Send; False: nobody is there any more."""
        raw = json.dumps(message, separators=(",", ":")).encode() + b"\n"
        try:
            with self._lock:
                self._connection.sendall(raw)
        except OSError:
            with suppress(OSError):  # a line that was begun cannot be taken back
                self._connection.shutdown(socket.SHUT_RDWR)
            return False
        return True

    def hear(self) -> dict[str, Any] | None:
        """The next message; None: the connection has ended, or what comes is none."""
        try:
            line = self._read.readline(_LINE)
            told = json.loads(line) if line.endswith(b"\n") else None
        except (OSError, ValueError):
            return None
        return told if isinstance(told, dict) else None

    def hold(self, seconds: float) -> None:
        """On purpose, let nothing arrive at this end for so long; see `resilin.cluster.isolation`."""
        hold(self._connection)

        def over() -> None:
            with suppress(OSError):  # it may have been closed since
                release(self._connection)

        timer = threading.Timer(seconds, over)
        timer.daemon = True
        timer.start()

    def close(self) -> None:
        """End the connection; who hears at either end comes out."""
        with suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)
        self._connection.close()
