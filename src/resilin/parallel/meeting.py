"""How the ranks of a group find out that they are on one machine, and get lines and pages of each other."""

from __future__ import annotations

import secrets
import socket
import sys
from collections.abc import Callable
from contextlib import ExitStack, suppress
from functools import cache
from pathlib import Path

import torch

from resilin.memory.pages import Handle, Pages, PagesError, spares
from resilin.parallel.lines import Line

_TOKEN = 16
_HELLO = 8 + _TOKEN
_FIRST = 1 << 16  # bytes of the first room of each rank; larger ones are made when they are needed
_STARTING = 10.0  # seconds for whoever connects to say who it is

Met = tuple[list[Line | None], list[Pages]]
"""By rank the line to it, None to oneself; and everyone's room."""


def meet(
    ranks: tuple[int, ...],
    index: int,
    timeout: float,
    tell: Callable[[list[int]], list[list[int]]],
    all_did: Callable[[bool], bool],
) -> Met | None:
    """Connect the ranks of a group, who all call together.

    Whoever knows the secret that a rank tells the group only, and can map what processes of one user can, is let in.

    Args:
        ranks: their numbers in the whole job, for errors.
        index: which of them this is.
        timeout: seconds that whoever waits in a line waits.
        tell: gives everyone's numbers, as many each.
        all_did: whether a thing was done by all.

    Returns:
        None where some rank cannot reach another, or map its pages: at all of them.
    """
    token = secrets.token_bytes(_TOKEN)
    with ExitStack() as stack:
        room, handle, port = Pages(torch.empty(0, dtype=torch.uint8)), [0] * 5, 0
        # A process may have no descriptor left: then it says that nobody can reach it, and all send messages.
        with suppress(OSError):
            door = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=len(ranks)))
            door.settimeout(timeout)
            room = spares.take(_FIRST)
            if room.handle is not None:
                handle, port = room.handle.json(), door.getsockname()[1]
        secret = [int.from_bytes(token[at : at + 4], "little") for at in range(0, _TOKEN, 4)]
        told = tell([*handle, port, _boot(), *secret])
        rooms: list[Pages] = []
        made: dict[int, socket.socket] = {}
        try:
            for rank, numbers in enumerate(told):
                rooms.append(room if rank == index else Pages.mapped(Handle.of_json(numbers[:5])))
            for rank, (*_, port, _, a, b, c, d) in enumerate(told[:index]):
                made[rank] = socket.create_connection(("127.0.0.1", port), timeout)
                made[rank].sendall(
                    index.to_bytes(8, "little") + b"".join(n.to_bytes(4, "little") for n in (a, b, c, d))
                )
            done = any(handle)
        except (OSError, PagesError):
            done = False
        if not all_did(done):
            for connection in made.values():
                connection.close()
            if index == 0 and len({one[6] for one in told}) == 1:
                _tell_once()
            return None
        while len(made) < len(ranks) - 1:  # they are all waiting at the door
            connection, _ = door.accept()
            connection.settimeout(_STARTING)
            who = _known(connection, token)
            if who is None or not index < who < len(ranks) or who in made:
                connection.close()
                continue
            made[who] = connection
    for connection in made.values():
        connection.settimeout(None)
    return [Line(made[rank], ranks[rank], timeout) if rank in made else None for rank in range(len(ranks))], rooms


def _known(connection: socket.socket, token: bytes) -> int | None:
    """Who has connected; None: somebody who does not know the secret."""
    said = b""
    try:
        while len(said) < _HELLO:
            if not (more := connection.recv(_HELLO - len(said))):
                return None
            said += more
    except OSError:
        return None
    return int.from_bytes(said[:8], "little") if secrets.compare_digest(said[8:], token) else None


@cache
def _boot() -> int:
    """A number of this machine's present run; 0 where there is none to be had."""
    try:
        return int(Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").replace("-", "")[:15], 16)
    except (OSError, ValueError):
        return 0


@cache
def _tell_once() -> None:
    sys.stderr.write("workers of this machine send each other messages: they cannot map each other's memory\n")
