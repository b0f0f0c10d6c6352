"""Where a running elastic job is found, and asking it something. Needs no torch: so commands that ask are quick."""

from __future__ import annotations

import json
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from resilin.cluster.addresses import LOOPBACK
from resilin.cluster.handshake import HandshakeError, prove
from resilin.cluster.wire import Wire

FILE = "cluster.json"
"""In the folder of the workers' output: where the job is found, and its secret."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a job is found.

    Attributes:
        host: the address, or name, to listen at.
        port: to listen at; 0: one that is free.
        secret: of the job; "": a new one.
        called: what others call `host`; "": the same.
        job: which one it is, for those who look for it in the file: of what started them all.
    """

    host: str = LOOPBACK
    port: int = 0
    secret: str = ""
    called: str = ""
    job: str = ""


def ask(place: Place, command: Mapping[str, Any]) -> dict[str, Any]:
    """Ask a running job.

    Args:
        place: where it is found.
        command: {"command": "status" | "add" | "drain" | "remove", "count", "host" or "number": ...}.

    Raises:
        ConnectionError: it does not answer.
    """
    connection = socket.create_connection((place.host, place.port), 10)
    wire = Wire(connection)
    try:
        prove(connection, place.secret)
        wire.say(command)
        answer = wire.hear()
    except HandshakeError as error:
        raise ConnectionError(str(error)) from None
    finally:
        wire.close()
    if answer is None:
        raise ConnectionError("it says nothing")
    return answer


def found(folder: Path) -> Place:
    """Where a job is found, by the folder of its workers' output.

    Raises:
        FileNotFoundError: no job runs there.
    """
    told = json.loads((folder / FILE).read_text(encoding="utf-8"))
    return Place(told["host"], int(told["port"]), told["secret"], job=told["job"])
