"""Two processes prove to each other that they know a job's secret, without saying it.

The one who listens sends a random challenge; the one who connects answers with a challenge of its own and an
HMAC-SHA-256 of both under the secret; only then the other proves itself in the same way (the two directions are marked,
so that no answer can be sent back). A stranger learns nothing and is not heard: everything has a fixed length, and is
waited for only some seconds. What follows on the connection is neither encrypted nor signed.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
import socket
from pathlib import Path

from resilin.config import UserError

SECRET = "RESILIN_SECRET"
"""The variable with a job's secret."""
SECRET_FILE = "RESILIN_SECRET_FILE"
"""The variable with the name of a file that holds it."""
_BYTES = 32
_PATIENCE = 10.0  # seconds
_LEAST = 16  # characters of a secret


class HandshakeError(RuntimeError):
    """The other side does not know the secret, or says nothing of use."""


def new_secret() -> str:
    """A secret that nobody can guess."""
    return secrets.token_hex(_BYTES)


def read_secret(file: Path | None = None) -> str | None:
    """The secret that a user gives: in a file, or in the environment; None: none was given.

    Args:
        file: that holds it; None: as `RESILIN_SECRET_FILE` says, or else `RESILIN_SECRET` itself.

    Raises:
        UserError: it cannot be read, others can read the file, or it is too short.
    """
    if file is None and os.environ.get(SECRET_FILE):
        file = Path(os.environ[SECRET_FILE])
    if file is None:
        found, where = os.environ.get(SECRET), SECRET
    else:
        where = str(file)
        try:
            if file.stat().st_mode & 0o077:
                raise UserError(f"{file}: others can read this secret; `chmod 600 {file}`")
            found = file.read_text(encoding="utf-8").strip()
        except OSError as error:
            raise UserError(f"{file}: the job's secret cannot be read: {error.strerror}") from None
    if found is not None and len(found) < _LEAST:
        raise UserError(
            f"{where}: a secret of {len(found)} characters can be guessed, and {_LEAST} are the least; make one with "
            "`openssl rand -hex 32`"
        )
    return found


def admit(connection: socket.socket, secret: str) -> None:
    """Let whoever has connected prove itself, then prove this side.

    Raises:
        HandshakeError: it could not.
    """
    try:
        connection.settimeout(_PATIENCE)
        mine = secrets.token_bytes(_BYTES)
        connection.sendall(mine)
        told = _exactly(connection, 2 * _BYTES)
        theirs, proof = told[:_BYTES], told[_BYTES:]
        if not hmac.compare_digest(proof, _proof(secret, b"connects", mine, theirs)):
            raise HandshakeError("whoever connected does not know the job's secret")
        connection.sendall(_proof(secret, b"listens", theirs, mine))
        connection.settimeout(None)
    except OSError as error:
        raise HandshakeError(f"whoever connected went away: {error}") from None


def prove(connection: socket.socket, secret: str, patience: float = _PATIENCE) -> None:
    """Prove this side to the one it has connected to, then let that one prove itself.

    Args:
        connection: to it.
        secret: of the job.
        patience: seconds that each part of the other side's answer may take.

    Raises:
        HandshakeError: one of both could not.
    """
    try:
        connection.settimeout(patience)
        theirs = _exactly(connection, _BYTES)
        mine = secrets.token_bytes(_BYTES)
        connection.sendall(mine + _proof(secret, b"connects", theirs, mine))
        if not hmac.compare_digest(_exactly(connection, _BYTES), _proof(secret, b"listens", mine, theirs)):
            raise HandshakeError("whoever listens there does not know the job's secret")
        connection.settimeout(None)
    except OSError as error:
        raise HandshakeError(f"whoever listens there says nothing: {error}") from None


def _proof(secret: str, who: bytes, first: bytes, second: bytes) -> bytes:
    return hmac.new(secret.encode(), b"resilin 1 " + who + first + second, hashlib.sha256).digest()


def _exactly(connection: socket.socket, count: int) -> bytes:
    found = b""
    while len(found) < count:
        piece = connection.recv(count - len(found))
        if not piece:
            raise HandshakeError("the connection was ended: is the secret the same at both ends?")
        found += piece
    return found
