"""Connections to a job's store that can be cut, one after the other; the next one is made before it is needed.

To connect takes torch a moment, and where names of addresses are looked up and nobody answers, seconds: with 32 members
that did so at once, new groups took five seconds instead of one. So one connection waits, made while the member trains.
"""

from __future__ import annotations

import threading
from typing import Any

from resilin.cluster.sockets import Socket, internet_sockets

_LATER = 1.0  # seconds after the last one was taken: a change is over by then, and what it needs is not shared

Made = tuple[Any, dict[int, int]]
"""A connection, and its socket: descriptor -> inode."""


class StoreConnections:
    """One at a time is ready.

    Args:
        store: of the job, which this process has connected to.
    """

    def __init__(self, store: Any) -> None:
        self._store = store
        self._making = threading.Lock()
        self._ready: Made | None = None
        self._timer: threading.Timer | None = None
        self._closed = False

    def take(self) -> Made:
        """A connection of its own."""
        with self._making:
            made, self._ready = self._ready or self._make(), None
            if self._timer is not None:
                self._timer.cancel()
            if not self._closed:
                self._timer = threading.Timer(_LATER, self._prepare)
                self._timer.daemon = True
                self._timer.start()
            return made

    @property
    def is_ready(self) -> bool:
        """Whether the next one can be had at once."""
        return self._ready is not None

    def is_to_store(self, one: Socket) -> bool:
        """Whether a socket is a connection to the store, which a process reaches at its loopback."""
        return one.other == ("127.0.0.1", self._store.port)

    def close(self) -> None:
        """Nothing is made any more, nor being made when this returns."""
        self._closed = True
        with self._making:  # what is under way is finished first: torch does not bear to be left alone with it
            self._ready = None
            if self._timer is not None:
                self._timer.cancel()

    def _prepare(self) -> None:
        with self._making:
            if self._ready is None and not self._closed:
                self._ready = self._make()

    def _make(self) -> Made:
        before = {one.inode for one in internet_sockets() if self.is_to_store(one)}
        connection = self._store.clone()
        there = [one for one in internet_sockets() if self.is_to_store(one)]
        return connection, {one.number: one.inode for one in there if one.inode not in before}
