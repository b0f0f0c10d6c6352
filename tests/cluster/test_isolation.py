"""Sockets that are cut off on purpose: nothing arrives, nothing is refused, and it is over after a while."""

from __future__ import annotations

import socket
import threading
import time

import pytest

from resilin.cluster.addresses import guard, listen
from resilin.cluster.handshake import admit
from resilin.cluster.isolation import Isolation, can_isolate, hold, release
from resilin.cluster.reach import lacking
from resilin.cluster.sockets import internet_sockets, opened

pytestmark = pytest.mark.skipif(not can_isolate(), reason="packets are dropped by a filter of Linux")


@pytest.fixture
def pair():
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as near:
        far, _ = server.accept()
        with far:
            yield server, near, far


def test_what_is_sent_to_a_held_socket_arrives_once_it_is_released(pair):
    _, near, far = pair
    hold(near)
    far.sendall(b"hello")
    near.settimeout(0.3)
    with pytest.raises(TimeoutError):
        near.recv(5)
    release(near)
    near.settimeout(30)
    assert near.recv(5) == b"hello"


def test_a_guarded_connection_that_is_held_ends_by_itself(pair):
    _, near, _ = pair
    guard(near, 1.0)
    hold(near)
    near.settimeout(60)
    near.sendall(b"is anybody there?")
    with pytest.raises(OSError, match="timed out"):
        near.recv(1)


def test_who_is_held_is_not_reached_and_is_afterwards():
    listening = listen("127.0.0.1")
    at = listening.getsockname()
    hold(listening)
    assert lacking([4, 7], lambda member: at if member == 7 else ("127.0.0.1", 1), "a secret", 0.3) == (4, 7)
    release(listening)

    def serve() -> None:
        connection, _ = listening.accept()
        with connection:
            admit(connection, "a secret")

    thread = threading.Thread(target=serve)
    thread.start()
    assert lacking([7], lambda member: at, "a secret", 30.0) == ()
    thread.join(30)
    listening.close()


@pytest.fixture
def door():
    with (
        socket.create_server(("127.0.0.1", 0)) as coordinator,
        socket.create_connection(coordinator.getsockname()) as near,
    ):
        far, _ = coordinator.accept()
        with far:
            yield coordinator, near, far


@pytest.mark.parametrize(
    ("side", "ends"), [("members", False), ("members", True), ("coordinator", False), ("all", True)]
)
def test_only_the_sockets_to_a_side_are_cut(side: str, ends: bool, pair, door):
    both = [(pair[1:], side != "coordinator"), (door[1:], side != "members")]
    thread = Isolation([door[0].getsockname()]).begin(side, ends, 2.0)
    time.sleep(0.2)
    for (near, far), cut in both:
        assert arrives(near, far) == (not cut)
    thread.join()
    for (near, far), cut in both:
        assert arrives(near, far, 20.0) == (not (cut and ends))


def arrives(near: socket.socket, far: socket.socket, patience: float = 0.1) -> bool:
    """Whether one byte that is sent comes to the other side."""
    near.settimeout(patience)
    try:
        far.sendall(b"!")
        return near.recv(1) == b"!"
    except OSError:
        return False


def test_sockets_of_this_process_are_found_and_opened_only_while_they_are_the_same(pair):
    server, near, far = pair
    found = {one.number: one for one in internet_sockets()}
    assert found[server.fileno()].listens
    assert found[near.fileno()].other == found[far.fileno()].own == server.getsockname()
    with opened(near.fileno(), found[near.fileno()].inode) as same:
        assert same.getpeername() == near.getpeername()
    with pytest.raises(OSError, match="another socket"):
        opened(near.fileno(), found[far.fileno()].inode)
