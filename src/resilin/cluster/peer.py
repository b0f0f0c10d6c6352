"""Copies of states between members, over sockets of their own: no collective, so nobody has to take part at one time.

A message is a line of JSON, then as many bytes as it says. First both sides prove that they know the job's secret
(`resilin.cluster.handshake`). Nothing is unpickled, and a length that is not expected ends the connection.
"""

from __future__ import annotations

import json
import socket
import sys
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from resilin.cluster.accepting import accept_each, admitted
from resilin.cluster.addresses import listen
from resilin.cluster.handshake import HandshakeError, prove
from resilin.cluster.pool import KEPT, Copy, CopyError, Pool, Slot
from resilin.memory.pages import Handle, Pages, PagesError

_LINE = 1 << 26  # bytes; the head of a copy names every tensor
_PIECES = 1 << 16
_MAPPED = KEPT + 1  # copies of one member that are read, and the one that comes


@dataclass(frozen=True, slots=True)
class Address:
    """Where a member listens."""

    host: str
    port: int


class PeerError(RuntimeError):
    """Another member could not be reached, or does not have what it was asked for."""


class _Channel:
    """A connection: lines and bytes."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.connection = connection
        self.slots: tuple[Slot, ...] | None = None  # of the last copy that was shared over it
        self.mapped: dict[Handle, Pages] = {}  # the pages of the last few, the newest last
        self._read: Any = connection.makefile("rb", buffering=1 << 16)

    def say(self, message: Mapping[str, Any], *data: memoryview) -> None:
        self.connection.sendall(json.dumps(message).encode() + b"\n")
        for piece in data:
            self.connection.sendall(piece)

    def hear(self) -> dict[str, Any] | None:
        line = self._read.readline(_LINE)
        if not line:
            return None
        if not line.endswith(b"\n"):
            raise PeerError("a message was cut off")
        told = json.loads(line)
        if not isinstance(told, dict):
            raise PeerError(f"this is no message: {told!r:.100}")
        return told

    def fill(self, memory: Tensor) -> None:
        """Read as many bytes as a uint8 tensor has."""
        view, done = _bytes(memory), 0
        while done < len(view):
            count = self._read.readinto(view[done:])
            if not count:
                raise PeerError(f"the connection ended after {done} of {len(view)} bytes")
            done += count

    def close(self) -> None:
        with suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)
        with suppress(OSError):
            self._read.close()
        self.connection.close()


def _key(told: Mapping[str, Any]) -> tuple[int, int, int]:
    return int(told["owner"]), int(told["epoch"]), int(told["version"])


def _bytes(tensor: Tensor) -> memoryview:
    array: Any = tensor.numpy()
    return memoryview(array).cast("B")


class PeerServer:
    """Takes copies from other members into a pool, and gives pieces of what is there.

    Args:
        pool: this member's.
        secret: of the job.
        host: the address to listen on.
    """

    def __init__(self, pool: Pool, secret: str, host: str = "127.0.0.1") -> None:
        self._pool, self._secret = pool, secret
        self._listening = listen(host)
        self.address = Address(host, self._listening.getsockname()[1])
        self._open: set[_Channel] = set()
        self._lock = threading.Lock()
        self._closed = False
        accept_each(self._listening, self._serve, "resilin-peer")

    def _serve(self, connection: socket.socket) -> None:
        if not admitted(connection, self._secret):
            return
        channel = _Channel(connection)
        with self._lock:
            self._open.add(channel)
            if self._closed:
                channel.close()
        try:
            while (told := channel.hear()) is not None:
                self._answer(channel, told)
        except (OSError, ValueError, PeerError):
            return  # whoever asked sees its connection end
        finally:
            with self._lock:
                self._open.discard(channel)
            channel.close()

    def _answer(self, channel: _Channel, told: dict[str, Any]) -> None:
        try:
            if told["do"] == "put":
                size = int(told["head"]["bytes"])
                pages = self._pool.memory(size)
                pages.laid_out = None
                channel.fill(pages.data[:size])
                copy = Copy.of_head(told["head"], pages)
                copy.check()
                self._pool.put(copy)
                channel.say({"ok": True})
            elif told["do"] == "share":
                self._pool.put(self._shared(channel, told))
                channel.say({"ok": True})
            elif told["do"] == "head":
                copy = self._pool.get(*_key(told))
                copy.check()  # pages that were shared are read for the first time
                channel.say({"ok": True, "head": copy.head()})
            elif told["do"] == "get":
                copy = self._pool.get(*_key(told))
                pieces = [(int(start), int(size)) for start, size in told["pieces"]]
                if any(start < 0 or size < 0 or start + size > copy.bytes for start, size in pieces):
                    raise CopyError(f"the copy of member {copy.owner} has {copy.bytes} bytes")
                view = _bytes(copy.data)
                channel.say({"ok": True}, *(view[start : start + size] for start, size in pieces))
            else:
                raise CopyError(f"nothing is known of {told['do']!r:.40}")
        except PagesError as error:
            channel.say({"ok": False, "far": True, "why": f"{error}"})
        except (CopyError, KeyError) as error:
            channel.say({"ok": False, "why": f"{error}"})

    @staticmethod
    def _shared(channel: _Channel, told: dict[str, Any]) -> Copy:
        """A copy in pages of a process of this machine, which fills the same few in turn."""
        handle = Handle.of_json(told["pages"])
        pages = channel.mapped.pop(handle, None) or Pages.mapped(handle)
        copy = Copy.of_head(told["head"], pages, channel.slots)
        channel.slots, channel.mapped[handle] = copy.slots, pages
        if len(channel.mapped) > _MAPPED:
            del channel.mapped[next(iter(channel.mapped))]
        return copy

    def close(self) -> None:
        """Stop listening, and end all connections."""
        self._closed = True
        # A thread that waits in `accept` is not woken by closing the socket alone.
        with suppress(OSError):
            self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()
        with self._lock:
            for channel in self._open:
                channel.close()


class Peer:
    """A connection to another member's server; one thread at a time uses it.

    Args:
        address: where it listens.
        secret: of the job.
        timeout: seconds without any progress after which it is given up.

    Raises:
        PeerError: it cannot be reached.
    """

    def __init__(self, address: Address, secret: str, timeout: float) -> None:
        self._address, self._near = address, True
        try:
            connection = socket.create_connection((address.host, address.port), timeout)
            prove(connection, secret)
            connection.settimeout(timeout)
            self._channel = _Channel(connection)
        except (OSError, HandshakeError) as error:
            raise PeerError(f"no member listens at {address.host}:{address.port}: {error}") from None

    def _ask(self, message: Mapping[str, Any], *data: memoryview) -> dict[str, Any]:
        try:
            self._channel.say(message, *data)
            told = self._channel.hear()
        except (OSError, ValueError) as error:
            raise PeerError(f"the member at {self._address.host}:{self._address.port} went away: {error}") from None
        if told is None:
            raise PeerError(f"the member at {self._address.host}:{self._address.port} ended the connection")
        if not told.get("ok"):
            raise (PagesError if told.get("far") else CopyError)(str(told.get("why", "no reason was given")))
        return told

    def put(self, copy: Copy) -> None:
        """Give a copy; returns once it is there: mapped, where both are on one machine, else sent and compared.

        Raises:
            PeerError, CopyError: it is not.
        """
        if self._near and copy.pages.handle is not None:
            try:
                head = copy.head(self._channel.slots)
                self._ask({"do": "share", "head": head, "pages": copy.pages.handle.json()})
            except PagesError as error:  # another machine, or as good as
                self._near = False
                where = f"{self._address.host}:{self._address.port}"
                sys.stderr.write(f"copies for the member at {where} are sent from now on: {error}\n")
            else:
                self._channel.slots = copy.slots
                return
        self._ask({"do": "put", "head": copy.head()}, _bytes(copy.data))

    def head(self, owner: int, epoch: int, version: int) -> dict[str, Any]:
        """The head of a copy that the member has.

        Raises:
            PeerError, CopyError: it has none.
        """
        found: dict[str, Any] = self._ask({"do": "head", "owner": owner, "epoch": epoch, "version": version})["head"]
        return found

    def get(self, owner: int, epoch: int, version: int, pieces: Sequence[tuple[int, int]]) -> list[Tensor]:
        """Pieces of a copy.

        Args:
            owner: whose states.
            epoch: of the view under which they were copied.
            version: of them.
            pieces: (first byte, bytes) of each.

        Raises:
            PeerError, CopyError: they are not there.
        """
        sizes = [size for _, size in pieces]
        found = list(torch.empty(sum(sizes), dtype=torch.uint8).split(sizes))
        self.fill(owner, epoch, version, [(start, to) for (start, _), to in zip(pieces, found, strict=True)])
        return found

    def fill(self, owner: int, epoch: int, version: int, pieces: Sequence[tuple[int, Tensor]]) -> None:
        """Fill memory with pieces of a copy.

        Args:
            owner: whose states.
            epoch: of the view under which they were copied.
            version: of them.
            pieces: (first byte, (bytes,) uint8) of each.

        Raises:
            PeerError, CopyError: they are not there.
        """
        for first in range(0, len(pieces), _PIECES):
            some = pieces[first : first + _PIECES]
            places = [(start, to.numel()) for start, to in some]
            self._ask({"do": "get", "owner": owner, "epoch": epoch, "version": version, "pieces": places})
            try:
                for _, to in some:
                    self._channel.fill(to)
            except OSError as error:
                raise PeerError(f"the member at {self._address.host}:{self._address.port} went away: {error}") from None

    def close(self) -> None:
        """End the connection; a call under way in another thread fails."""
        self._channel.close()
