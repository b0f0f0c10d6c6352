"""Processes of workers on this machine: forked from one that is ready, where that can be, else started anew.

A new Python process takes seconds of a core until torch and Resilin are imported; that is most of the time in which a
small run begins, or a lost worker is replaced. On Linux without an accelerator, a command `python -m resilin ...` is
therefore run by a fork of `resilin.cluster.fork_server`, of which there is one for this process.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Protocol

from resilin.cluster.forked import GoneError, server_for

FRESH = "RESILIN_FRESH_PROCESSES"
"""The variable that, if it is not empty, has every worker started as a new Python process."""
_UNLESS_SAID = {"THP_MEM_ALLOC_ENABLE": "1"}
"""Large tensors lie in large pages where the system offers them, whoever launches a run: a command does so for itself
(`resilin.cli`), and a library's user may not."""


class Process(Protocol):
    """What `subprocess.Popen` has of a process, and a forked one too."""

    pid: int

    def poll(self) -> int | None:
        """Its exit code, negative for a signal; None while it runs."""

    def wait(self) -> int:
        """The same, once it has ended."""

    def send_signal(self, sig: int, /) -> None:
        """Send a signal, unless it has ended."""

    def kill(self) -> None:
        """Send SIGKILL."""


def get_ready(command: Sequence[str]) -> None:
    """Begin to import what workers that run a command will need, in a process of its own; returns at once."""
    if _can_fork(command):
        server_for({**_UNLESS_SAID, **os.environ})


def start_process(
    command: Sequence[str],
    environment: Mapping[str, str],
    *,
    output: IO[bytes] | None = None,
    kept: Mapping[str, int] | None = None,
) -> Process:
    """Start a worker in a session of its own: Ctrl-C reaches the launcher alone, which passes it on.

    Args:
        command: what it runs.
        environment: all variables, but for what is the same for all workers unless it is said here.
        output: where it writes; it reads nothing then. None: it has the terminal of this process.
        kept: by variable a descriptor that it inherits; the variable tells it the number.

    Raises:
        OSError: there is no such command, or no room for one more process.
    """
    kept, environment = kept or {}, {**_UNLESS_SAID, **environment}
    if _can_fork(command):
        try:
            return server_for(environment).start(command[2], command[3:], environment, output, kept)
        except GoneError:
            sys.stderr.write("the process that forks workers is gone: this one is started anew, which takes longer\n")
    return subprocess.Popen(
        command,
        env={**environment, **{variable: str(number) for variable, number in kept.items()}},
        pass_fds=tuple(kept.values()),
        start_new_session=True,
        stdin=None if output is None else subprocess.DEVNULL,
        stdout=output,
        stderr=output,
    )


def _can_fork(command: Sequence[str]) -> bool:
    accelerators = (Path("/dev/nvidiactl"), Path("/dev/kfd"))  # their drivers may not outlive a fork
    return (
        list(command[:3]) == [sys.executable, "-m", "resilin"]
        and sys.platform == "linux"
        and hasattr(os, "pidfd_open")
        and not os.environ.get(FRESH)
        and not any(path.exists() for path in accelerators)
    )
