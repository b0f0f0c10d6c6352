"""After every step a member's states go to its holders, while the next step is computed (ElasWave, section 7)."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

from resilin.cluster.peer import Peer, PeerError
from resilin.cluster.pool import Copy, CopyError
from resilin.cluster.scheduling import answer_at_once

_ATTEMPTS = 3


class StoppedError(RuntimeError):
    """Who waited for a snapshot was told to stop."""


class Snapshots:
    """Sends copies from a thread of its own, the newest first.

    Args:
        connect: to another member.
        arrived: called, in that thread, with every version that all holders have.
    """

    def __init__(self, connect: Callable[[int], Peer], arrived: Callable[[int], None] = lambda version: None) -> None:
        self._connect, self._arrived = connect, arrived
        self._changed = threading.Condition()
        self._holders: tuple[int, ...] = ()
        self._copy: Copy | None = None
        self._there = -1  # the newest version that all holders have
        self._stopped: str | None = "nothing was begun"
        self._round = 0
        self._closed = False
        self._peers: dict[int, Peer] = {}
        self._thread = threading.Thread(target=self._go, name="resilin-snapshots", daemon=True)
        self._thread.start()

    def begin(self, holders: Sequence[int]) -> None:
        """A new view: copies go to these members from now on."""
        with self._changed:
            self._holders, self._stopped, self._copy, self._there = tuple(holders), None, None, -1
            self._round += 1
            self._changed.notify_all()

    def give(self, copy: Copy) -> None:
        """Send a copy; returns at once."""
        with self._changed:
            if self._holders:
                self._copy = copy
            else:
                self._there = copy.version
            self._changed.notify_all()

    def wait(self, version: int) -> None:
        """Return once all holders have said that they have this version, or a later one.

        Raises:
            StoppedError: `stop` was called.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._there >= version or self._stopped is not None)
            if self._there < version:
                raise StoppedError(f"the states of version {version} did not reach their holders: {self._stopped}")

    def stop(self, why: str) -> None:
        """The view has ended: whoever waits comes out, and nothing more is sent."""
        with self._changed:
            if self._stopped is None:
                self._stopped = why
            self._round += 1
            self._copy = None
            for peer in self._peers.values():
                peer.close()
            self._peers.clear()
            self._changed.notify_all()

    def close(self) -> None:
        """End the thread."""
        self.stop("this member ends")
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join()

    def _go(self) -> None:
        answer_at_once()
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._copy is not None or self._closed)
                if self._closed:
                    return
                copy, holders, number = self._copy, self._holders, self._round
                self._copy = None
            assert copy is not None
            try:
                for holder in holders:
                    self._put(holder, copy, number)
            except (PeerError, CopyError) as error:
                with self._changed:
                    if self._round == number and self._stopped is None:
                        self._stopped = str(error)
                        self._changed.notify_all()
                continue
            with self._changed:
                if self._round == number:
                    self._there = max(self._there, copy.version)
                    self._arrived(copy.version)
                    self._changed.notify_all()

    def _put(self, holder: int, copy: Copy, number: int) -> None:
        for attempt in range(_ATTEMPTS):
            try:
                peer = self._peer(holder, number)
                peer.put(copy)
            except PeerError:  # the connection may have been ended by the change of a view
                with self._changed:
                    if self._round != number or attempt == _ATTEMPTS - 1:
                        raise
                    self._peers.pop(holder, None)
            else:
                return

    def _peer(self, holder: int, number: int) -> Peer:
        with self._changed:
            known = self._peers.get(holder)
        if known is not None:
            return known
        made = self._connect(holder)
        with self._changed:
            if self._round != number:
                made.close()
                raise PeerError("the view has ended")
            self._peers[holder] = made
        return made
