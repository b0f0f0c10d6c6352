"""The job's store, from another machine: through connections that have proven the secret, and through no other."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from datetime import timedelta

import pytest
import torch.distributed as dist

from resilin.cluster import tunnel
from resilin.cluster.accepting import accept_each, admitted
from resilin.cluster.starter import Door
from resilin.cluster.tunnel import Relay
from resilin.cluster.wire import Wire


@pytest.fixture
def door() -> Iterator[Door]:
    """A coordinator that does nothing but lead to a store."""
    store = dist.TCPStore("127.0.0.1", 0, None, True, timedelta(seconds=30), wait_for_workers=False)
    listening = socket.create_server(("127.0.0.1", 0))

    def serve(connection: socket.socket) -> None:
        if admitted(connection, "the secret"):
            wire = Wire(connection)
            if wire.hear() == {"store": True}:
                tunnel.serve(connection, wire, store.port)

    accept_each(listening, serve, "test")
    yield Door("127.0.0.1", listening.getsockname()[1], "the secret")
    listening.shutdown(socket.SHUT_RDWR)
    listening.close()


def at(relay: Relay, seconds: float = 20) -> dist.TCPStore:
    return dist.TCPStore("127.0.0.1", relay.port, None, False, timedelta(seconds=seconds))


def test_workers_find_the_store_and_each_other_there(door: Door):
    one, other = Relay(door, 10), Relay(door, 10)
    mine, theirs = at(one), at(other)
    mine.set("key", b"x" * 1_000_000)  # more than one piece
    assert theirs.get("key") == b"x" * 1_000_000
    copied = theirs.clone()  # a connection of its own, as every epoch has
    waited = threading.Thread(target=lambda: copied.wait(["late"], timedelta(seconds=20)))
    waited.start()
    mine.set("late", b"1")
    waited.join(20)
    assert not waited.is_alive()
    one.close()
    other.close()


def test_whoever_does_not_know_the_secret_reaches_nothing(door: Door):
    relay = Relay(Door(door.host, door.port, "another secret"), 10)
    with pytest.raises((dist.DistError, RuntimeError)):
        at(relay, 1).get("key")
    relay.close()


def test_an_end_on_one_side_is_one_on_the_other(door: Door):
    relay = Relay(door, 10)
    with socket.create_connection(("127.0.0.1", relay.port), 10) as inside:
        inside.settimeout(20)
        began = time.monotonic()
        inside.shutdown(socket.SHUT_WR)
        assert inside.recv(1) == b""
        assert time.monotonic() - began < 15  # and not after the time-out
    relay.close()
