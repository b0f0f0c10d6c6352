"""Both sides of a connection prove that they know a job's secret; strangers learn nothing and are not heard."""

from __future__ import annotations

import socket
import threading
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from resilin.cluster.handshake import HandshakeError, admit, prove, read_secret
from resilin.config import UserError


class Two:
    """Two ends of a connection, and what `admit` said at one of them."""

    def __init__(self, secret: str) -> None:
        self.near, self.far = socket.socketpair()
        self.error: HandshakeError | None = None
        self.thread = threading.Thread(target=self._admit, args=(secret,))
        self.thread.start()

    def _admit(self, secret: str) -> None:
        try:
            admit(self.far, secret)
        except HandshakeError as error:
            self.error = error
            self.far.close()

    def end(self) -> HandshakeError | None:
        self.thread.join(20)
        self.near.close()
        self.far.close()
        return self.error


@given(st.text(min_size=1, max_size=40), st.text(min_size=1, max_size=40))
@settings(max_examples=40, deadline=None)
def test_whoever_knows_the_secret_is_heard_and_nobody_else(one: str, other: str):
    two = Two(one)
    try:
        prove(two.near, other)
        told = True
    except HandshakeError:
        told = False
    assert (two.end() is None, told) == (one == other, one == other)


def test_the_one_who_listens_has_to_know_it_as_well():
    near, far = socket.socketpair()
    far.sendall(bytes(32))  # a challenge, and then an answer of the right length: from somebody who knows nothing
    threading.Thread(target=lambda: (far.recv(64), far.sendall(bytes(32)))).start()
    with pytest.raises(HandshakeError, match="whoever listens there does not know the job's secret"):
        prove(near, "secret")
    near.close()
    far.close()


def test_an_answer_cannot_be_sent_back_as_ones_own():
    """A stranger who lets the listener answer its own challenge on another connection has nothing to send."""
    first = Two("secret")
    challenge = first.near.recv(32)
    first.near.sendall(challenge + bytes(32))
    assert first.near.recv(32) == b""  # no proof is given before one was
    assert "does not know" in str(first.end())


def test_nothing_of_the_secret_is_said():
    said = []

    class Told(socket.socket):
        def sendall(self, data, *more):  # type: ignore[no-untyped-def]
            said.append(bytes(data))
            super().sendall(data, *more)

    near, far = socket.socketpair()
    listens = threading.Thread(target=admit, args=(Told(fileno=far.detach()), "a long secret"))
    listens.start()
    prove(Told(fileno=near.detach()), "a long secret")
    listens.join(20)
    assert [len(each) for each in said] == [32, 64, 32]
    assert b"a long secret" not in b"".join(said)


def test_a_secret_is_read_from_a_file_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name in ("RESILIN_SECRET", "RESILIN_SECRET_FILE"):
        monkeypatch.delenv(name, raising=False)
    assert read_secret() is None
    file = tmp_path / "secret"
    file.write_text("0123456789abcdef\n")
    file.chmod(0o640)
    with pytest.raises(UserError, match=r"others can read this secret; `chmod 600"):
        read_secret(file)
    file.chmod(0o600)
    assert read_secret(file) == "0123456789abcdef"
    monkeypatch.setenv("RESILIN_SECRET", "too short")
    with pytest.raises(UserError, match="9 characters can be guessed"):
        read_secret()
    monkeypatch.setenv("RESILIN_SECRET_FILE", str(file))
    assert read_secret() == "0123456789abcdef"
    with pytest.raises(UserError, match="cannot be read: No such file"):
        read_secret(tmp_path / "none")
