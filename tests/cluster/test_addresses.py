"""Addresses as users write them and as the system has them."""

from __future__ import annotations

import socket

import pytest
from hypothesis import given
from hypothesis import strategies as st

from resilin.cluster.addresses import is_loopback, joined, listen, of_interface, own_address, parse
from resilin.config import UserError


@given(st.ip_addresses().map(str) | st.from_regex(r"[a-z][a-z0-9.-]{0,20}", fullmatch=True), st.integers(1, 65535))
def test_what_is_joined_is_read_again(host: str, port: int):
    assert parse(joined(host, port)) == (host, port)


@pytest.mark.parametrize("text", ["", "host", "host:", ":29400", "host:0", "host:70000", "host:port", "runs/run"])
def test_what_is_no_address_is_refused(text: str):
    with pytest.raises(UserError, match="is no address: expected HOST:PORT"):
        parse(text)


def test_where_nobody_can_listen_that_is_said():
    with pytest.raises(UserError, match=r"cannot listen at 192\.0\.2\.1:29400"):
        listen("192.0.2.1", 29400)
    with listen("127.0.0.1") as taken, pytest.raises(UserError, match="in use"):
        listen("127.0.0.1", taken.getsockname()[1])


def test_an_address_is_that_of_the_way_to_the_coordinator_or_of_an_interface(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    with listen("127.0.0.1") as listening, socket.create_connection(listening.getsockname()) as connection:
        assert own_address(connection) == "127.0.0.1"
        monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
        assert own_address(connection) == "127.0.0.1"
    with pytest.raises(UserError, match="the interface 'nosuch0' has no address"):
        of_interface("nosuch0")


def test_only_this_machine_reaches_its_loopback():
    assert [is_loopback(each) for each in ("127.0.0.3", "::1", "localhost", "10.0.0.1", "fd00::1", "node7")] == [
        True, True, True, False, False, False,
    ]  # fmt: skip
