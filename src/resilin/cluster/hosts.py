"""Workers on machines that have joined: on each a keeper (`resilin.cluster.keeper`) starts what it is told to.

A keeper brings so many seats, and a worker sits on each at once. Whoever loses its keeper is lost: a machine that
stops answering takes all its workers with it, in one change.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from resilin.cluster.addresses import is_loopback
from resilin.cluster.starter import Door
from resilin.cluster.wire import Wire


class JoinError(RuntimeError):
    """A machine cannot take part, as it is."""


@dataclass
class Keeper:
    """One that has joined.

    Attributes:
        key: that nobody else has.
        name: of its machine.
        seats: how many workers it is meant to have.
        wire: to it.
        heard: when it last said something.
        running: numbers of its workers, and in words what they are.
        leaving: whether it takes no more.
    """

    key: str
    name: str
    seats: int
    wire: Wire
    heard: float
    running: dict[int, str] = field(default_factory=dict)
    leaving: bool = False


class Hosts:
    """Starts workers on machines that have joined.

    Args:
        folder: for the workers' output, as it is called on every machine.
        silence: seconds without a sign of life after which a keeper counts as lost.
    """

    steady = False

    def __init__(self, folder: str, silence: float) -> None:
        self._folder, self._silence = folder, silence
        self._keepers: dict[str, Keeper] = {}
        self._count = 0
        self._loopback: bool | None = None  # whether those that have joined are all on one machine
        self._ended: list[tuple[int, str]] = []
        self._code: int | None = None
        self._lock = threading.RLock()

    # -- machines -----------------------------------------------------------------------------------------------

    def admit(self, wire: Wire, told: Mapping[str, Any]) -> Keeper:
        """A keeper has come.

        Args:
            wire: to it.
            told: {"keeper": name of its machine, "address": at which others reach its workers, "seats": how many}.

        Raises:
            JoinError: it cannot take part.
        """
        name, address, seats = str(told["keeper"]), str(told["address"]), int(told["seats"])
        with self._lock:
            if self._code is not None:
                raise JoinError("the run is over")
            if not self._keepers:
                self._loopback = None
            if self._loopback is None:
                self._loopback = is_loopback(address)
            if self._loopback != is_loopback(address):
                here, there = ("the loopback", address) if self._loopback else ("other addresses", address)
                raise JoinError(
                    f"workers at {there} and workers at {here} cannot reach each other: give all machines addresses "
                    "that the others reach (--address), and let them join at the coordinator's own (not at 127.0.0.1)"
                )
            self._count += 1
            keeper = Keeper(f"{name}#{self._count}", name, seats, wire, time.monotonic())
            self._keepers[keeper.key] = keeper
            wire.say({"ok": True, "folder": self._folder, "silence": self._silence})
            return keeper

    def hear(self, keeper: Keeper) -> None:
        """Hear a keeper until it goes, whose workers then count as lost."""
        while (told := keeper.wire.hear()) is not None:
            with self._lock:
                keeper.heard = time.monotonic()
                if told.get("did") == "leave":
                    keeper.leaving = True
                elif told.get("did") == "started":
                    if (number := int(told["number"])) in keeper.running:
                        keeper.running[number] = f"{told['process']} at {keeper.name}"
                elif told.get("did") == "ended":
                    self._end(keeper, int(told["number"]), str(told["how"]))
        self._drop(keeper)

    def _end(self, keeper: Keeper, number: int, how: str) -> None:
        if keeper.running.pop(number, None) is not None:
            self._ended.append((number, how))

    def _drop(self, keeper: Keeper) -> None:
        with self._lock:
            if self._keepers.pop(keeper.key, None) is None:
                return
            keeper.wire.close()
            for number in list(keeper.running):
                self._end(keeper, number, f"was lost with its machine {keeper.name}")

    # -- workers ------------------------------------------------------------------------------------------------

    def start(self, number: int, environment: Mapping[str, str], door: Door, at: str | None = None) -> bool:
        """Start a worker where a seat is free, the most of them first; or at a machine, free or not."""
        with self._lock:
            able = [k for k in self._keepers.values() if not k.leaving and self._code is None]
            if at is not None:
                able = [keeper for keeper in able if at in (keeper.name, keeper.key)]
            else:
                able = [keeper for keeper in able if len(keeper.running) < keeper.seats]
            if not able:
                return False
            keeper = max(able, key=lambda keeper: keeper.seats - len(keeper.running))
            keeper.running[number] = f"at {keeper.name}"
            # The secret is not said: the keeper has it.
            keeper.wire.say({"do": "start", "number": number, "environment": dict(environment)})
            return True

    def _of(self, number: int) -> Keeper | None:
        return next((keeper for keeper in self._keepers.values() if number in keeper.running), None)

    def signal(self, number: int, which: int) -> bool:
        """Send a signal."""
        with self._lock:
            keeper = self._of(number)
            return keeper is not None and keeper.wire.say({"do": "signal", "number": number, "which": int(which)})

    def gone(self, number: int) -> None:
        """Its seat is free."""
        with self._lock:
            keeper = self._of(number)
            if keeper is not None:
                del keeper.running[number]

    def ended(self) -> list[tuple[int, str]]:
        """Who has ended, and how."""
        now = time.monotonic()
        for keeper in list(self._keepers.values()):
            if now - keeper.heard > self._silence:
                self._drop(keeper)
        with self._lock:
            found, self._ended = self._ended, []
            return found

    def running(self) -> dict[int, str]:
        """By number where."""
        with self._lock:
            return {number: said for keeper in self._keepers.values() for number, said in keeper.running.items()}

    def names(self) -> list[str]:
        """Machines that have joined."""
        with self._lock:
            return sorted({keeper.name for keeper in self._keepers.values()})

    def log(self, number: int) -> str:
        """Where a worker's output goes."""
        keeper = self._of(number)
        return f"{self._folder}/worker-{number}.log{f' at {keeper.name}' if keeper is not None else ''}"

    def part(self, code: int) -> None:
        """Keepers are told how the job ended."""
        with self._lock:
            self._code = code
            for keeper in self._keepers.values():
                keeper.wire.say({"do": "end", "code": code})

    def close(self) -> None:
        """Kill what is left."""
        with self._lock:
            for keeper in list(self._keepers.values()):
                for number in list(keeper.running):
                    keeper.wire.say({"do": "signal", "number": number, "which": int(signal.SIGKILL)})
                keeper.wire.close()
