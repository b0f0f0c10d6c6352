"""Whom the page is for."""

from __future__ import annotations

import pytest

from resilin.dashboard.access import Access, is_loopback


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1", "127.3.2.1"])
def test_the_loopback_needs_no_token(host: str):
    access = Access.at(host)
    assert is_loopback(host)
    assert access.token == ""
    assert access.admits(None)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.7", "node-3.cluster"])
def test_any_other_address_does(host: str):
    access = Access.at(host)
    assert not is_loopback(host)
    assert len(access.token) >= 32
    assert access.token != Access.at(host).token
    assert not access.admits(None)
    assert not access.admits("resilin-watch=")
    assert not access.admits("resilin-watch=wrong; other=1")
    assert not access.admits("resilin-watch=\u00fc")
    assert access.admits(f"other=1; resilin-watch={access.token}")
    assert access.set_cookie() == f"resilin-watch={access.token}; Path=/; HttpOnly; SameSite=Lax"


def test_an_empty_token_is_no_password():
    assert not Access("127.0.0.1").right("")
    assert not Access("0.0.0.0", "secret").right("")
    assert Access("0.0.0.0", "secret").right("secret")


@pytest.mark.parametrize(
    ("header", "known"),
    [
        ("localhost", True), ("localhost:8420", True), ("LOCALHOST:9", True), ("127.0.0.1:8420", True),
        ("[::1]:8420", True), ("[::1]", True), ("evil.example", False), ("evil.example:8420", False),
        ("localhost.evil.example", False), ("127.0.0.1.evil.example", False), ("", False), (None, False),
        ("[::1].evil.example", False),
    ],
)  # fmt: skip
def test_another_name_for_the_loopback_is_not_answered(header: str | None, known: bool):
    assert Access.at("127.0.0.1").knows_host(header) is known


def test_with_a_token_any_name_will_do():
    assert Access.at("0.0.0.0").knows_host("node-3.cluster:8420")
