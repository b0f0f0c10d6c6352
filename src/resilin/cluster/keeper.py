"""On a machine that has joined an elastic run: starts the workers that the coordinator wants, and tells of their ends.

It needs no torch, and outlives its workers: what kills one of them, memory that runs out, say, leaves it to tell.
SIGTERM, SIGUSR1 or Ctrl-C are a notice: its workers leave the run, without losing work, and then it ends.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

from resilin.cluster.addresses import guard, joined, own_address
from resilin.cluster.handshake import HandshakeError, prove
from resilin.cluster.lifeline import when_gone
from resilin.cluster.local_starter import LocalStarter
from resilin.cluster.starter import ADDRESS, HOST, Door
from resilin.cluster.wire import Wire
from resilin.config import UserError

KEEPER = "RESILIN_KEEPER"
"""The variable with the descriptor of a pipe whose other end the keeper has: a worker ends with it."""
NOTICES = (signal.SIGTERM, signal.SIGUSR1)
"""Signals by which somebody says that a machine, or a place on it, will be taken away."""
_POLL, _BEAT, _RETRY = 0.02, 1.0, 0.2
_GRACE = 5.0  # seconds that workers have to end by themselves, once the job is over
_LOST = 3


def end_with_keeper() -> None:
    """Called in a worker: it ends at once when its keeper has, as it would with its machine."""

    def end() -> None:
        os.write(2, b"the process that started this worker is gone, and so it ends\n")
        os._exit(_LOST)

    when_gone(KEEPER, end, "resilin-keeper")


class NobodyThereError(UserError):
    """No coordinator, or none of this job, answers."""


class StrangerError(NobodyThereError):
    """Somebody else answers."""


def when_there(
    look: Callable[[], Door], make: Callable[[Door], Keeper], patience: float, *, settled: bool = False
) -> Keeper:
    """A keeper, as soon as there is a coordinator.

    Args:
        look: where it is found now; what an earlier one has left behind may still say where that one was.
        make: the keeper.
        patience: seconds for which there may be none yet.
        settled: what is found is what a user has said: if somebody else answers there, that is no matter of time.

    Raises:
        NobodyThereError: there was none.
        UserError: the keeper cannot take part.
    """
    until = time.monotonic() + patience
    while True:
        try:
            return make(look())
        except NobodyThereError as error:
            if (settled and isinstance(error, StrangerError)) or time.monotonic() > until:
                raise
            time.sleep(_RETRY)


def _connect(door: Door) -> socket.socket:
    at = joined(door.host, door.port)
    try:
        connection = socket.create_connection((door.host, door.port), 10)
    except OSError as error:
        raise NobodyThereError(f"no coordinator answers at {at}: {error.strerror or error}") from None
    try:
        prove(connection, door.secret)
    except HandshakeError as error:
        connection.close()
        raise StrangerError(f"{at}: {error}") from None
    return connection


class Keeper:
    """One machine's part, or one of several on it.

    Args:
        door: of the job.
        workers: how many to start.
        command: what every worker runs.
        name: of this machine, by which copies are kept elsewhere; "": the system's, and its address.
        address: at which other machines reach this one; "": that of its way to the coordinator.
        elsewhere: whether other workers are on other machines for sure.

    Raises:
        NobodyThereError: no coordinator of this job is there.
        UserError: it cannot take part.
    """

    def __init__(
        self,
        door: Door,
        workers: int,
        command: Sequence[str],
        *,
        name: str = "",
        address: str = "",
        elsewhere: bool = False,
    ) -> None:
        self._door = door
        connection = _connect(door)
        self.address = address or own_address(connection, elsewhere)
        self.name = name or f"{socket.gethostname()} ({self.address})"
        self._wire = Wire(connection)
        self._wire.say({"keeper": self.name, "address": self.address, "seats": workers})
        told = self._wire.hear()
        if told is None or not told.get("ok"):
            raise UserError(f"{joined(door.host, door.port)}: {(told or {}).get('why', 'the coordinator has ended')}")
        guard(connection, max(float(told["silence"]), 1.0))
        self.folder = Path(told["folder"])
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"{self.folder}: the run's folder cannot be made on this machine ({error.strerror}); it has to be "
                "where all machines find it by this name"
            ) from None
        self._theirs, self._ours = os.pipe()
        more = {ADDRESS: self.address, HOST: self.name}
        self._starter = LocalStarter(command, self.folder, more, {KEEPER: self._theirs}, workers)
        self._code: int | None = None
        self._lost = False
        self._notices = 0
        self._interrupts = 0

    def run(self) -> int:
        """Until the job is over, or this machine's part in it; gives the code to end with."""
        threading.Thread(target=self._hear, name="resilin-keeper", daemon=True).start()
        beaten, said = 0.0, False
        try:
            while self._code is None and not self._lost:
                self._tell_ends()
                if time.monotonic() - beaten > _BEAT:
                    beaten = time.monotonic()
                    self._wire.say({"did": "beat"})
                if self._interrupts > 1:
                    return 130
                if (self._notices or self._interrupts) and not said:
                    said = True
                    self._leave()
                if said and not self._starter.running():
                    return 0
                time.sleep(_POLL)
            until = time.monotonic() + _GRACE
            while time.monotonic() < until and self._starter.running():
                self._tell_ends()
                time.sleep(_POLL)
        finally:
            self._starter.close()
            self._wire.close()
            os.close(self._ours)
            os.close(self._theirs)
        if self._code is not None:
            return self._code
        sys.stderr.write("the coordinator is gone, and with it the run: go on from its last checkpoint with --resume\n")
        return 1

    def notice(self, number: int = signal.SIGTERM, frame: object = None) -> None:
        """This machine's workers are to leave; a second Ctrl-C ends them at once. May be a handler of signals."""
        if number == signal.SIGINT:
            self._interrupts += 1
        else:
            self._notices += 1

    @contextmanager
    def noticing(self) -> Iterator[None]:
        """While entered, signals to this process are notices."""
        before = {number: signal.signal(number, self.notice) for number in (*NOTICES, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _leave(self) -> None:
        self._wire.say({"did": "leave"})
        for number in self._starter.running():
            self._starter.signal(number, signal.SIGTERM)

    def _tell_ends(self) -> None:
        for number, how in self._starter.ended():
            self._wire.say({"did": "ended", "number": number, "how": how})

    def _hear(self) -> None:
        while (told := self._wire.hear()) is not None:
            if told["do"] == "start":
                number = int(told["number"])
                try:
                    self._starter.start(number, told["environment"], replace(self._door, store=None))
                except OSError as error:
                    self._wire.say({"did": "ended", "number": number, "how": f"could not be started: {error}"})
                    continue
                with suppress(KeyError):
                    self._wire.say({"did": "started", "number": number, "process": self._starter.running()[number]})
            elif told["do"] == "signal":
                self._starter.signal(int(told["number"]), int(told["which"]))
            elif told["do"] == "end":
                self._code = int(told["code"])
        self._lost = True
