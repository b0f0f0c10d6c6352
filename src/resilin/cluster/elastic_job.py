"""The one who sees a job of workers that come and go through: hears them, and carries out what the coordinator decides.

It never trains, and outlives all workers: the store of the job, the run's log and what is shown are its own. Who starts
workers, and where, is a `Starter`. Workers, machines that join, and the commands that add or remove workers, all reach
it at one port, where both sides prove that they know the job's secret (`resilin.cluster.handshake`); the secret lies in
a file that only this user can read.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

from torch._C._distributed_c10d import TCPStore

from resilin.cluster import tunnel
from resilin.cluster.accepting import accept_each, admitted
from resilin.cluster.addresses import LOOPBACK, guard, listen
from resilin.cluster.axes import ClocksHook
from resilin.cluster.clock_setter import ClockSetter
from resilin.cluster.handshake import new_secret
from resilin.cluster.hosts import Hosts, JoinError
from resilin.cluster.isolation import Side
from resilin.cluster.place import FILE, Place
from resilin.cluster.protocol.coordinator import Coordinator
from resilin.cluster.protocol.effects import Effect, Fence, Finish, Note, SetClocks, Tell
from resilin.cluster.protocol.messages import Isolate, MessageError, Signal, Told, of_json, to_json
from resilin.cluster.protocol.rules import Rules
from resilin.cluster.pulse import watch
from resilin.cluster.starter import Door, Starter, how
from resilin.cluster.status import status_of
from resilin.cluster.wire import Wire

_TICK, _POLL, _MOMENT = 0.1, 0.01, 0.01
_GRACE = 5.0  # seconds that workers have to end by themselves, once the job is over


@dataclass(frozen=True, slots=True)
class JobEnded:
    """How a job of workers that come and go ended.

    Attributes:
        code: that the launcher ends with.
        message: why, for people; empty where all is well.
    """

    code: int
    message: str


class ElasticJob:
    """A job.

    Args:
        starter: of workers.
        rules: of the coordinator.
        folder: where the workers' output and the job's address go.
        facts: what all workers find in the store, by key.
        hear: told of every event that the worker who speaks for the run has, as JSON values.
        note: told of every decision: a word, and facts.
        begin: how many workers to start.
        most: how many to have, as soon as there is room; 0: no more than began.
        replace: whether another worker is started for each that is lost.
        environment: more variables for the workers.
        place: where the job is found.
        clocks: is handed the clocks of all stages whenever they are to change.

    Raises:
        UserError: it cannot listen there.
    """

    def __init__(
        self,
        starter: Starter,
        rules: Rules,
        folder: Path,
        *,
        facts: Mapping[str, str],
        hear: Callable[[Mapping[str, Any]], None],
        note: Callable[[str, Mapping[str, Any]], None],
        begin: int,
        most: int = 0,
        replace: bool = False,
        environment: Mapping[str, str] | None = None,
        place: Place | None = None,
        clocks: ClocksHook | None = None,
    ) -> None:
        self._starter, self._folder, self._hear, self._say = starter, folder, hear, note
        self._begin, self._most, self._replace = begin, most, replace
        self._environment, self._place = dict(environment or {}), place or Place()
        self._secret = self._place.secret or new_secret()
        self._rules, self._coordinator = rules, Coordinator(rules)
        self._lock = threading.RLock()
        self._setter = ClockSetter(clocks, note) if clocks is not None else None
        self._wires: dict[int, Wire] = {}
        self._dying: set[int] = set()  # whose deaths are known, and whose ends are yet to come
        self._number = 0
        self._finish: Finish | None = None
        self._over = threading.Event()
        self._interrupts = self._passed_on = 0
        self._beyond_reach: dict[int, float] = {}  # workers that are cut off on purpose, and until when
        folder.mkdir(parents=True, exist_ok=True)
        self._listening = listen(self._place.host, self._place.port)
        self.store = _store_on_loopback()
        host = LOOPBACK if self._place.host in ("0.0.0.0", "::") else self._place.host
        self.door = Door(host, int(self._listening.getsockname()[1]), self._secret, self.store.port)
        """Of this machine."""
        for key, value in facts.items():
            self.store.set(key, value)

    # -- from the beginning to the end --------------------------------------------------------------------------

    def run(self) -> JobEnded:
        """Start the workers, and see the job through."""
        file = self._folder / FILE
        before = {
            number: signal.signal(number, self._interrupt) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
        }
        try:
            self._write_file(file)
            accept_each(self._listening, self._serve, "resilin-accept")
            for _ in range(self._begin):
                self.add()
            ticked = time.monotonic()
            while not self._over.wait(self._pause()):
                self._reap()
                self._pass_on()
                if time.monotonic() - ticked >= _TICK:
                    ticked = time.monotonic()
                    with self._lock:
                        self._do(self._coordinator.tick(ticked))
                        self._fill()
            self._part()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            file.unlink(missing_ok=True)
            with suppress(OSError):
                self._listening.shutdown(socket.SHUT_RDWR)
            self._listening.close()
            self._starter.close()
            if self._setter is not None:
                self._setter.close()
        return self._ended()

    def _pause(self) -> float:
        """Seconds until it is looked again. The end of a worker that is connected is noticed by its connection."""
        with self._lock:
            return _TICK if self._wires.keys() >= self._starter.running().keys() else _POLL

    def _write_file(self, path: Path) -> None:
        called = self._place.called or (
            socket.gethostname() if self._place.host in ("0.0.0.0", "::") else self._place.host
        )
        told = {
            "host": called,
            "port": self.door.port,
            "secret": self._secret,
            "process": os.getpid(),
            "job": self._place.job,
        }
        path.unlink(missing_ok=True)
        new = path.with_suffix(".new")
        new.unlink(missing_ok=True)
        with os.fdopen(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            json.dump(told, file)
        new.rename(path)  # whoever looks for it finds all of it

    def _ended(self) -> JobEnded:
        assert self._finish is not None
        if self._interrupts or self._coordinator.homeward:
            return JobEnded(130, "")
        if self._finish.good:
            return JobEnded(0, "")
        return JobEnded(1, f"{self._finish.why}\n{self._finish.failure}".strip())

    def _part(self) -> None:
        """Workers end by themselves; those that do not are killed."""
        self._starter.part(self._ended().code)
        until = time.monotonic() + _GRACE
        while time.monotonic() < until:
            with self._lock:  # those who hear the last connections end ask as well
                self._starter.ended()
                if not self._starter.running():
                    return
            time.sleep(_POLL)

    def _interrupt(self, number: int, frame: object) -> None:
        """The run saves and ends. At Ctrl-C after that all are killed; `resilin.run.interrupts` has why only then."""
        if number == signal.SIGINT or not self._interrupts:
            self._interrupts += 1

    def _pass_on(self) -> None:
        """What `_interrupt` was told, outside of the handler: the signal may have come in the middle of anything."""
        if self._interrupts and self._coordinator.phase == "gathering":
            with self._lock:
                if not self._wires and not self._starter.running():  # nobody is there who could save
                    self._finish = self._finish or Finish(False, "interrupted")
                    self._over.set()
        if self._interrupts == self._passed_on:
            return
        self._passed_on = self._interrupts
        with self._lock:
            for number in self._starter.running():
                if self._interrupts > 1:
                    self._starter.signal(number, signal.SIGKILL)
                elif number not in self._wires:
                    self._starter.signal(number, signal.SIGINT)
            if self._interrupts == 1:
                for wire in self._wires.values():
                    wire.say(to_json(Signal(signal.SIGINT)))
            else:
                self._finish = self._finish or Finish(False, "interrupted twice")
                self._over.set()

    # -- workers ------------------------------------------------------------------------------------------------

    def add(self, at: str | None = None) -> int | None:
        """Start one more worker, or as soon as there is room; gives its number, or None where there is none.

        Args:
            at: the name of the machine; None: any.
        """
        with self._lock:
            number = self._number
            if not self._starter.start(number, self._environment, self.door, at):
                return None
            self._number += 1
            return number

    def _fill(self) -> None:
        """Have as many workers as there may be."""
        if self._most and not self._interrupts and self._coordinator.phase != "ended":
            for _ in range(self._most - len(self._starter.running())):
                self.add()

    def training(self) -> list[int]:
        """The members of the present view that are alive."""
        with self._lock:
            view = self._coordinator.view
            return [n for n in view.members if n in self._coordinator.members] if view is not None else []

    @property
    def team(self) -> int:
        """Workers that compute together: one that is lost leaves the others of its team over."""
        return self._rules.tensor

    @property
    def fewest(self) -> int:
        """Workers that the model needs: one, or one team, for each stage."""
        return self._rules.stages * self._rules.tensor

    def signal(self, number: int, which: int) -> bool:
        """Send a signal to a worker; False: there is none of that number."""
        with self._lock:
            return self._starter.signal(number, which)

    def isolate(self, number: int, side: Side, ends: bool, seconds: float) -> bool:
        """Cut a worker off on purpose (`resilin.cluster.isolation`); False: there is none of that number.

        Args:
            number: of the worker.
            side: whom from. Where that is the coordinator too, nothing that this job does reaches its process.
            ends: whether its connections are ended first.
            seconds: for how long.
        """
        with self._lock:
            wire = self._wires.get(number)
            if wire is None:
                return False
            wire.say(to_json(Isolate(side, ends, seconds)))
            if side != "members":
                self._beyond_reach[number] = time.monotonic() + seconds
                if not ends:
                    wire.hold(seconds)
            return True

    def _reap(self) -> None:
        with self._lock:
            for number, why in self._starter.ended():
                if number in self._dying:
                    self._dying.remove(number)
                else:
                    self._gone(number, why)

    def _gone(self, number: int, why: str) -> None:
        self._starter.gone(number)
        if self._over.is_set():
            return
        if self.store.check(["preparing"]) and self.store.get("preparing") == str(number).encode():
            self.store.delete_key("preparing")  # what it was to prepare for all, another one does
        known = number in self._coordinator.members
        wire = self._wires.pop(number, None)
        if wire is not None:
            wire.close()
        before = self._coordinator.phase
        if not known and before == "gathering":  # it did not even say hello
            self._lost_before(number, why)
            return
        leaving = known and self._coordinator.members[number].leaving
        self._do(self._coordinator.gone(number, why, _now()))
        if known and not leaving and before != "gathering":
            self._take_the_place_of_one()

    def _dies(self, wire: Wire, number: int, which: int) -> None:
        """A worker's process has begun to die of a signal; that it has ended is told later, and is no news then."""
        with self._lock:
            reached = time.monotonic() > self._beyond_reach.get(number, 0.0)
            if self._wires.get(number) is wire and number in self._coordinator.members and reached:
                self._dying.add(number)
                self._gone(number, how(-which))

    def _take_the_place_of_one(self) -> None:
        """Another worker for one that was lost, if so wished."""
        if self._replace and not self._over.is_set():
            self.add()

    def _lost_before(self, number: int, why: str) -> None:
        why = f"{why} before it began; see {self._starter.log(number)}"
        if self._starter.steady:
            self._do(self._coordinator.stop(f"worker {number} {why}"))
        else:
            self._say("lost", {"member": number, "why": why})

    # -- what is heard ------------------------------------------------------------------------------------------

    def _serve(self, connection: socket.socket) -> None:
        if not admitted(connection, self._secret):
            return
        guard(connection, max(self._rules.silence, 1.0))
        wire = Wire(connection)
        first = wire.hear()
        if first is None:
            wire.close()
            return
        if "command" in first:
            wire.say(self._command_of(first))
            wire.close()
            return
        if "store" in first:
            tunnel.serve(connection, wire, self.store.port)
            return
        try:
            if "keeper" in first:
                self._hear_keeper(wire, first)
            else:
                self._hear_member(wire, int(first["number"]), first.get("pulse", ()))
        except Exception as error:  # of a listener, say: a disk that is full
            trace = "".join(traceback.format_exception(error))
            with self._lock:
                self._do(self._coordinator.stop(f"the launcher failed: {error}", trace))

    def _hear_keeper(self, wire: Wire, first: Mapping[str, Any]) -> None:
        if not isinstance(self._starter, Hosts):
            wire.say({"ok": False, "why": "this run starts its workers itself: no machine can join"})
            wire.close()
            return
        try:
            keeper = self._starter.admit(wire, first)
        except JoinError as error:
            wire.say({"ok": False, "why": str(error)})
            wire.close()
            return
        with self._lock:
            self._say("joined", {"host": keeper.name, "workers": keeper.seats})
            for _ in range(keeper.seats):
                self.add(keeper.key)
        self._starter.hear(keeper)

    def _hear_member(self, wire: Wire, number: int, pulse: Sequence[int]) -> None:
        with self._lock:
            self._wires[number] = wire
        watch(pulse, partial(self._dies, wire, number))
        while (told := wire.hear()) is not None:
            try:
                message = of_json(told)
            except MessageError as error:
                sys.stderr.write(f"worker {number} said something strange: {error}\n")
                continue
            if isinstance(message, Told):
                self._hear(message.event)
                continue
            with self._lock:
                if self._wires.get(number) is wire:
                    self._do(self._coordinator.told(number, message, _now()))
        # Mostly its process has ended, and whoever started it says so in a moment.
        until = time.monotonic() + _MOMENT
        while time.monotonic() < until and self._wires.get(number) is wire:
            self._reap()
            time.sleep(0.001)
        with self._lock:
            if self._wires.get(number) is wire:
                self._gone(number, "lost its connection")

    def _command_of(self, told: Mapping[str, Any]) -> dict[str, Any]:
        """What a user asks while the job runs."""
        with self._lock:
            if told["command"] == "status":
                return {"ok": True, **self.status()}
            if told["command"] == "add":
                return self._add_more(int(told.get("count", 1)), told.get("host"))
            number = int(told.get("number", -1))
            if told["command"] in ("drain", "remove") and number not in self._coordinator.members:
                have = ", ".join(map(str, sorted(self._coordinator.members)))
                return {"ok": False, "why": f"there is no worker {number}; there are {have}"}
            if told["command"] == "drain":
                self._do([Tell(number, Signal(signal.SIGTERM))])  # as whoever takes a machine away does
                return {"ok": True}
            if told["command"] == "remove":
                self._fence(number)
                self._gone(number, "was removed")
                return {"ok": True}
        return {"ok": False, "why": f"nothing is known of {told['command']!r:.40}"}

    def _add_more(self, count: int, at: str | None) -> dict[str, Any]:
        have = self._starter.names() if isinstance(self._starter, Hosts) else []
        if at is not None and at not in have:
            why = (
                f"no machine {at!r} has joined; there are {', '.join(have)}"
                if have
                else "no machine has joined this run"
            )
            return {"ok": False, "why": why}
        numbers = [number for _ in range(count) if (number := self.add(at)) is not None]
        if not numbers:
            return {"ok": False, "why": f"no machine has a seat free; name one with --host ({', '.join(have)})"}
        return {"ok": True, "numbers": numbers}

    def status(self) -> dict[str, Any]:
        """What the job does; see `status_of`."""
        with self._lock:
            return status_of(self._coordinator, self._starter.running())

    # -- what is done -------------------------------------------------------------------------------------------

    def _do(self, effects: Sequence[Effect]) -> None:
        for effect in effects:
            if isinstance(effect, Tell):
                wire = self._wires.get(effect.number)
                if wire is not None:
                    wire.say(to_json(effect.message))
            elif isinstance(effect, Fence):
                self._fence(effect.number)
                self._take_the_place_of_one()
            elif isinstance(effect, SetClocks):
                if self._setter is not None:
                    self._setter.set(effect.stages)
            elif isinstance(effect, Note):
                self._say(effect.what, effect.facts)
            else:
                self._finish = self._finish or effect
                self._say("end", {"good": effect.good, "why": effect.why})
                self._over.set()

    def _fence(self, number: int) -> None:
        if time.monotonic() > self._beyond_reach.get(number, 0.0):
            self._starter.signal(number, signal.SIGKILL)
        self._starter.gone(number)
        wire = self._wires.pop(number, None)
        if wire is not None:
            wire.close()


def _store_on_loopback() -> TCPStore:
    """A store that listens on this machine's loopback only: left to itself, torch's listens everywhere."""
    listening = socket.create_server(("127.0.0.1", 0))
    port = listening.getsockname()[1]
    return TCPStore(
        "127.0.0.1", port, None, True, timedelta(seconds=300), wait_for_workers=False,
        master_listen_fd=listening.detach(),
    )  # fmt: skip


def _now() -> float:
    return time.monotonic()
