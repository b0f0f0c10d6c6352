"""Workers as processes of this machine."""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from resilin.cluster.position import MEMBER
from resilin.cluster.process import Process, get_ready, start_process
from resilin.cluster.starter import Door, how

SHARING = "LOCAL_WORLD_SIZE"


class LocalStarter:
    """Starts processes here.

    Args:
        command: what every worker runs.
        folder: where their output goes.
        more: variables for all of them.
        kept: by variable a descriptor that they inherit.
        sharing: workers that begin on this machine, whose cores they share.
    """

    steady = True

    def __init__(
        self,
        command: Sequence[str],
        folder: Path,
        more: Mapping[str, str] | None = None,
        kept: Mapping[str, int] | None = None,
        sharing: int = 1,
    ) -> None:
        self._sharing = {SHARING: os.environ.get(SHARING, str(sharing))}  # torchrun has said so already
        self._command, self._folder, self._more, self._kept = list(command), folder, dict(more or {}), dict(kept or {})
        self._processes: dict[int, Process] = {}
        get_ready(self._command)

    def start(self, number: int, environment: Mapping[str, str], door: Door, at: str | None = None) -> bool:
        """Start a process; `at` has to be nobody else's name."""
        with self.path(number).open("wb") as log:
            self._processes[number] = start_process(
                self._command,
                {**os.environ, **door.environment(), **self._sharing, **self._more, **environment, MEMBER: str(number)},
                output=log,
                kept=self._kept,
            )
        return True

    def signal(self, number: int, which: int) -> bool:
        """Send a signal."""
        process = self._processes.get(number)
        if process is None or process.poll() is not None:
            return False
        with suppress(ProcessLookupError):
            process.send_signal(which)
        return True

    def gone(self, number: int) -> None:
        """Nothing to be done: its process ends by itself, and is waited for."""

    def ended(self) -> list[tuple[int, str]]:
        """Who has ended, and how."""
        found = [(number, code) for number, p in list(self._processes.items()) if (code := p.poll()) is not None]
        for number, _ in found:
            del self._processes[number]
        return [(number, how(code)) for number, code in found]

    def running(self) -> dict[int, str]:
        """By number the process."""
        return {number: f"process {process.pid}" for number, process in self._processes.items()}

    def path(self, number: int) -> Path:
        """The file with a worker's output."""
        return self._folder / f"worker-{number}.log"

    def log(self, number: int) -> str:
        """The same, in words."""
        return str(self.path(number))

    def part(self, code: int) -> None:
        """Nothing to be done: workers are told by the coordinator."""

    def close(self) -> None:
        """Kill what is left."""
        for number, process in list(self._processes.items()):
            self.signal(number, signal.SIGKILL)
            process.wait()  # what it had locked is free then, for whoever goes on with the run's folder
