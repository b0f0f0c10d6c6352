"""The launcher of workers that come and go: it starts them, hears them, and carries out what the coordinator decides.

It never trains, and outlives all workers: the store of the job, the run's log and what is shown are its own. Workers,
and the commands that add or remove some, reach it at one port of this machine's loopback with the job's secret, which
lies in a file that only this user can read.
"""

from __future__ import annotations

import hmac
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from torch._C._distributed_c10d import TCPStore

from resilin.cluster.position import MEMBER
from resilin.cluster.protocol.coordinator import Coordinator
from resilin.cluster.protocol.effects import Effect, Fence, Finish, Note, Tell
from resilin.cluster.protocol.messages import MessageError, Told, of_json, to_json
from resilin.cluster.protocol.rules import Rules
from resilin.cluster.wire import Wire

COORDINATOR, SECRET, STORE = "RESILIN_COORDINATOR", "RESILIN_SECRET", "RESILIN_STORE"
ADDRESS = "cluster.json"
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
        command: what every worker runs.
        rules: of the coordinator.
        folder: where the workers' output and the job's address go.
        facts: what all workers find in the store, by key.
        hear: told of every event that the worker who speaks for the run has, as JSON values.
        note: told of every decision: a word, and facts.
        replace: whether another worker is started for each that is lost.
        environment: more variables for the workers.
    """

    def __init__(
        self,
        command: Sequence[str],
        rules: Rules,
        folder: Path,
        *,
        facts: Mapping[str, str],
        hear: Callable[[Mapping[str, Any]], None],
        note: Callable[[str, Mapping[str, Any]], None],
        replace: bool = False,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self._command, self._folder, self._hear, self._say = list(command), folder, hear, note
        self._replace, self._environment = replace, dict(environment or {})
        self._secret = secrets.token_hex(16)
        self._coordinator = Coordinator(rules)
        self._lock = threading.RLock()
        self._processes: dict[int, subprocess.Popen[bytes]] = {}
        self._wires: dict[int, Wire] = {}
        self._number = 0
        self._wanted = rules.members
        self._finish: Finish | None = None
        self._over = threading.Event()
        self._interrupts = 0
        folder.mkdir(parents=True, exist_ok=True)
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.store = _store_on_loopback()
        for key, value in facts.items():
            self.store.set(key, value)

    # -- from the beginning to the end --------------------------------------------------------------------------

    def run(self) -> JobEnded:
        """Start the workers, and see the job through."""
        address = self._folder / ADDRESS
        before = {number: signal.signal(number, self._interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            self._write_address(address)
            threading.Thread(target=self._accept, name="resilin-accept", daemon=True).start()
            for _ in range(self._wanted):
                self.add()
            ticked = time.monotonic()
            while not self._over.wait(_POLL):
                self._reap()
                if time.monotonic() - ticked > _TICK:
                    ticked = time.monotonic()
                    with self._lock:
                        self._do(self._coordinator.tick(ticked))
            self._part()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            address.unlink(missing_ok=True)
            with suppress(OSError):
                self._listening.shutdown(socket.SHUT_RDWR)
            self._listening.close()
            for process in list(self._processes.values()):
                if process.poll() is None:
                    process.kill()
                    process.wait()  # what it had locked is free then, for whoever goes on with the run's folder
        return self._ended()

    def _write_address(self, path: Path) -> None:
        told = {"port": self._listening.getsockname()[1], "secret": self._secret, "process": os.getpid()}
        path.unlink(missing_ok=True)
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            json.dump(told, file)

    def _ended(self) -> JobEnded:
        assert self._finish is not None
        if self._interrupts:
            return JobEnded(130, "")
        if self._finish.good:
            return JobEnded(0, "")
        return JobEnded(1, f"{self._finish.why}\n{self._finish.failure}".strip())

    def _part(self) -> None:
        """Workers end by themselves; those that do not are killed."""
        until = time.monotonic() + _GRACE
        while time.monotonic() < until and any(p.poll() is None for p in list(self._processes.values())):
            time.sleep(_POLL)

    def _interrupt(self, number: int, frame: object) -> None:
        """Passed on as Ctrl-C, whichever it was: the run saves and ends. The second time all are killed."""
        self._interrupts += 1
        for process in list(self._processes.values()):
            if process.poll() is None:
                process.send_signal(signal.SIGINT if self._interrupts == 1 else signal.SIGKILL)
        if self._interrupts > 1:
            self._finish = self._finish or Finish(False, "interrupted twice")
            self._over.set()

    # -- workers ------------------------------------------------------------------------------------------------

    def add(self) -> int:
        """Start one more worker; gives its number."""
        with self._lock:
            number, self._number = self._number, self._number + 1
            environment = {
                **os.environ,
                **self._environment,
                MEMBER: str(number),
                COORDINATOR: f"127.0.0.1:{self._listening.getsockname()[1]}",
                SECRET: self._secret,
                STORE: f"127.0.0.1:{self.store.port}",
            }
            with self.log(number).open("wb") as log:
                self._processes[number] = subprocess.Popen(
                    self._command,
                    env=environment,
                    start_new_session=True,  # Ctrl-C reaches the launcher alone, which passes it on
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                )
            return number

    def training(self) -> list[int]:
        """The members of the present view that are alive."""
        with self._lock:
            view = self._coordinator.view
            return [n for n in view.members if n in self._coordinator.members] if view is not None else []

    def signal(self, number: int, which: int) -> bool:
        """Send a signal to a worker; False: there is none of that number."""
        with self._lock:
            process = self._processes.get(number)
            if process is None:
                return False
            process.send_signal(which)
            return True

    def log(self, number: int) -> Path:
        """Where a worker's output goes."""
        return self._folder / f"worker-{number}.log"

    def _reap(self) -> None:
        for number, process in list(self._processes.items()):
            code = process.poll()
            if code is None:
                continue
            del self._processes[number]
            with self._lock:
                self._gone(number, _how(code))

    def _gone(self, number: int, how: str) -> None:
        known = number in self._coordinator.members
        wire = self._wires.pop(number, None)
        if wire is not None:
            wire.close()
        before = self._coordinator.phase
        if not known and before == "gathering":  # it did not even say hello
            self._do(self._coordinator.stop(f"worker {number} {how} before it began; see {self.log(number)}"))
            return
        leaving = known and self._coordinator.members[number].leaving
        self._do(self._coordinator.gone(number, how, _now()))
        if self._replace and known and not leaving and before != "gathering" and not self._over.is_set():
            self.add()

    # -- what is heard ------------------------------------------------------------------------------------------

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listening.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(Wire(connection),), daemon=True).start()

    def _serve(self, wire: Wire) -> None:
        first = wire.hear()
        if first is None or not hmac.compare_digest(str(first.get("secret", "")), self._secret):
            wire.close()
            return
        if "command" in first:
            wire.say(self._command_of(first))
            wire.close()
            return
        try:
            self._hear_member(wire, int(first["number"]))
        except Exception as error:  # of a listener, say: a disk that is full
            trace = "".join(traceback.format_exception(error))
            with self._lock:
                self._do(self._coordinator.stop(f"the launcher failed: {error}", trace))

    def _hear_member(self, wire: Wire, number: int) -> None:
        with self._lock:
            self._wires[number] = wire
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
        how = self._how_it_went(number)
        with self._lock:
            if self._wires.get(number) is wire:
                self._gone(number, how)

    def _how_it_went(self, number: int) -> str:
        """Of a worker whose connection has ended: mostly its process has, and the system says so in a moment."""
        until = time.monotonic() + _MOMENT
        while (process := self._processes.get(number)) is not None and time.monotonic() < until:
            if (code := process.poll()) is not None:
                return _how(code)
            time.sleep(0.001)
        return "lost its connection"

    def _command_of(self, told: Mapping[str, Any]) -> dict[str, Any]:
        """What a user asks while the job runs."""
        with self._lock:
            if told["command"] == "status":
                return {"ok": True, **self._status()}
            if told["command"] == "add":
                return {"ok": True, "numbers": [self.add() for _ in range(int(told.get("count", 1)))]}
            number = int(told.get("number", -1))
            if told["command"] in ("drain", "remove") and number not in self._coordinator.members:
                have = ", ".join(map(str, sorted(self._coordinator.members)))
                return {"ok": False, "why": f"there is no worker {number}; there are {have}"}
            if told["command"] == "drain":
                self.signal(number, signal.SIGTERM)  # as whoever takes a machine away does
                return {"ok": True}
            if told["command"] == "remove":
                if number in self._processes:
                    self._processes[number].kill()
                return {"ok": True}
        return {"ok": False, "why": f"nothing is known of {told['command']!r:.40}"}

    def _status(self) -> dict[str, Any]:
        view, members = self._coordinator.view, []
        for number, member in sorted(self._coordinator.members.items()):
            beat, inside = member.beat, view is not None and number in view.members
            process = self._processes.get(number)
            members.append(
                {
                    "number": number,
                    "host": member.host,
                    "process": process.pid if process is not None else None,
                    "state": "leaving" if member.leaving else "in" if inside else "warm" if member.warm else "starting",
                    "step": beat.step if beat is not None else None,
                    "doing": beat.doing if beat is not None else "",
                    "seconds": beat.seconds if beat is not None else 0.0,
                    "holders": list(view.holders[number]) if view is not None and inside else [],
                }
            )
        phase, version = self._coordinator.phase, self._coordinator.version
        return {"phase": phase, "epoch": view.epoch if view is not None else None, "step": version, "members": members}

    # -- what is done -------------------------------------------------------------------------------------------

    def _do(self, effects: Sequence[Effect]) -> None:
        for effect in effects:
            if isinstance(effect, Tell):
                wire = self._wires.get(effect.number)
                if wire is not None:
                    wire.say(to_json(effect.message))
            elif isinstance(effect, Fence):
                self._fence(effect.number)
            elif isinstance(effect, Note):
                self._say(effect.what, effect.facts)
            else:
                self._finish = self._finish or effect
                self._say("end", {"good": effect.good, "why": effect.why})
                self._over.set()

    def _fence(self, number: int) -> None:
        if number in self._processes:
            self._processes[number].kill()
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


def _how(code: int) -> str:
    return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"


def _now() -> float:
    return time.monotonic()


def ask(folder: Path, command: Mapping[str, Any]) -> dict[str, Any]:
    """Ask the launcher of a running job.

    Args:
        folder: the one of its workers.
        command: {"command": "status" | "add" | "drain" | "remove", "count" or "number": ...}.

    Raises:
        FileNotFoundError: no job runs there.
        ConnectionError: it does not answer.
    """
    path = folder / ADDRESS
    told = json.loads(path.read_text(encoding="utf-8"))
    wire = Wire(socket.create_connection(("127.0.0.1", int(told["port"])), 10))
    try:
        wire.say({"secret": told["secret"], **command})
        answer = wire.hear()
    finally:
        wire.close()
    if answer is None:
        raise ConnectionError(f"the launcher of {folder} does not answer")
    return answer
