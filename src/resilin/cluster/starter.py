"""Who starts the workers of an elastic run, and hears of their ends: a protocol, apart from the job that decides."""

from __future__ import annotations

import signal
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from resilin.cluster.addresses import joined
from resilin.cluster.handshake import SECRET

COORDINATOR = "RESILIN_COORDINATOR"
"""The variable with the address of the coordinator."""
STORE = "RESILIN_STORE"
"""The variable with the address of the job's store, on the coordinator's own machine; elsewhere it is reached through
the coordinator (`resilin.cluster.tunnel`)."""
ADDRESS = "RESILIN_ADDRESS"
"""The variable with the address at which others reach a worker; without it, that of its way to the coordinator."""
HOST = "RESILIN_HOST"
"""The variable with the name of the machine that a worker is on, for the view; without it, that of the system."""


@dataclass(frozen=True, slots=True)
class Door:
    """Where a worker finds its job.

    Attributes:
        host: address of the coordinator.
        port: of it.
        secret: of the job.
        store: the port of the job's store on the loopback; None: not on this machine.
    """

    host: str
    port: int
    secret: str
    store: int | None = None

    def environment(self) -> dict[str, str]:
        """The variables that a worker looks at."""
        store = {} if self.store is None else {STORE: joined("127.0.0.1", self.store)}
        return {COORDINATOR: joined(self.host, self.port), SECRET: self.secret, **store}


class Starter(Protocol):
    """Starts workers somewhere. All methods are called with the job's lock held, but may be at any time.

    Attributes:
        steady: whether a worker that ends before the run has begun means that there will be none; else others may come.
    """

    steady: bool

    def start(self, number: int, environment: Mapping[str, str], door: Door, at: str | None = None) -> bool:
        """Start a worker, or see to it that it is started once there is room; False: there is none, nor will be.

        Args:
            number: of the worker.
            environment: what it finds beside the door.
            door: where it finds the job.
            at: the name of the machine; None: any.
        """

    def signal(self, number: int, which: int) -> bool:
        """Send a signal to a worker's process; False: there is none of that number."""

    def gone(self, number: int) -> None:
        """A worker has taken its leave of the job, or was lost: its process counts no more, though it may still end."""

    def ended(self) -> list[tuple[int, str]]:
        """Workers whose processes have ended since this was last asked, and how; they are forgotten."""

    def running(self) -> dict[int, str]:
        """Processes that are to be, or are: by number where, in words."""

    def log(self, number: int) -> str:
        """Where a worker's output goes, in words."""

    def part(self, code: int) -> None:
        """The job is over: nothing is started any more; whoever helps is told how it ended."""

    def close(self) -> None:
        """End whatever is left, at once."""


def how(code: int) -> str:
    """How a process ended, in words, from its exit code."""
    return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
