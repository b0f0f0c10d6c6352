"""Whether other members are reached from here: a connection to where each listens, with the mutual proof; no more."""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from resilin.cluster.handshake import HandshakeError, prove
from resilin.cluster.sockets import At

_AT_ONCE = 16


def lacking(members: Sequence[int], at: Callable[[int], At], secret: str, seconds: float) -> tuple[int, ...]:
    """Those of some members that are not reached.

    Args:
        members: their numbers.
        at: where each listens.
        secret: of the job.
        seconds: within which each has to answer.
    """

    def reached(number: int) -> bool:
        try:
            with socket.create_connection(at(number), seconds) as connection:
                prove(connection, secret, seconds)
        except (OSError, RuntimeError, HandshakeError):
            return False
        return True

    if not members:
        return ()
    with ThreadPoolExecutor(min(_AT_ONCE, len(members)), "resilin-probe") as pool:
        return tuple(number for number, found in zip(members, pool.map(reached, members), strict=True) if not found)
