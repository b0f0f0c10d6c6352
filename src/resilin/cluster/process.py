"""Processes of workers on this machine: forked from one that is ready, where that can be, else started anew.

A new Python process takes seconds of a core until torch and Resilin are imported; that is most of the time in which a
small run begins, or a lost worker is replaced. On Linux without an accelerator, a command `python -m resilin ...` is
therefore run by a fork of `resilin.cluster.fork_server`, of which there is one for this process.
"""

from __future__ import annotations

import atexit
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, Protocol

from resilin.cluster.fork_server import HEADER

FRESH = "RESILIN_FRESH_PROCESSES"
"""The variable that, if it is not empty, has every worker started as a new Python process."""
# By name: they are in layers above. Whatever else a worker needs, it imports itself.
_IMPORTED = ("resilin.cli.main", "resilin.run.elastic_start", "resilin.run.start")
_READ_EARLY = ("PYTHON", "OMP_", "KMP_", "GOMP_", "MKL_", "OPENBLAS_", "NUMEXPR_", "TORCH", "PYTORCH", "LD_", "CUDA")
_PATIENCE = 120.0  # seconds that imports may take
_POLL = 0.01
_LOST = 1


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
        _server_for(os.environ)


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
        environment: all variables.
        output: where it writes; it reads nothing then. None: it has the terminal of this process.
        kept: by variable a descriptor that it inherits; the variable tells it the number.

    Raises:
        OSError: there is no such command, or no room for one more process.
    """
    kept = kept or {}
    if _can_fork(command):
        try:
            return _server_for(environment).start(command[2], command[3:], environment, output, kept)
        except _GoneError:
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


def _readable(descriptor: int, seconds: float) -> bool:
    asked = select.poll()  # select() knows the first 1024 descriptors only
    asked.register(descriptor, select.POLLIN)
    return bool(asked.poll(max(0.0, 1000 * seconds)))


class _GoneError(Exception):
    """The server could not import, or was killed."""


class _Forked:
    def __init__(self, server: _Server, pid: int) -> None:
        self.pid, self._server = pid, server
        self.code: int | None = None
        self._handle: int | None = None
        with suppress(ProcessLookupError):  # once it has ended, its number may be another's
            self._handle = os.pidfd_open(pid)

    def poll(self) -> int | None:
        if self.code is None:
            self._server.look()
        if self.code is None and self._server.gone and self._over():
            self.code = _LOST  # nobody has seen how
        if self.code is not None:
            self._let_go()
        return self.code

    def _over(self) -> bool:
        return self._handle is None or _readable(self._handle, 0.0)

    def _let_go(self) -> None:
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None

    def wait(self) -> int:
        while (code := self.poll()) is None:
            time.sleep(_POLL)
        return code

    def send_signal(self, sig: int, /) -> None:
        with suppress(ProcessLookupError):
            if self.poll() is None and self._handle is not None:
                signal.pidfd_send_signal(self._handle, sig)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def __del__(self) -> None:
        self._let_go()


class _Server:
    """One fork server, from the side of who asks it.

    Args:
        environment: it begins with.
    """

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._lock = threading.RLock()
        self._running: dict[int, _Forked] = {}
        self._heard = b""
        self.gone = False
        self._socket, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "resilin.cluster.fork_server", str(theirs.fileno()), *_IMPORTED],
                env=dict(environment),
                pass_fds=(theirs.fileno(),),
                start_new_session=True,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
            )

    def start(
        self,
        module: str,
        arguments: Sequence[str],
        environment: Mapping[str, str],
        output: IO[bytes] | None,
        kept: Mapping[str, int],
    ) -> _Forked:
        """Fork.

        Raises:
            _GoneError: the server is gone.
            OSError: there is no room for one more process.
        """
        told: dict[str, Any] = {
            "module": module,
            "arguments": list(arguments),
            "environment": dict(environment),
            "folder": str(Path.cwd()),
            "kept": list(kept),
        }
        body = json.dumps(told).encode()
        nothing = os.open(os.devnull, os.O_RDONLY)
        try:
            streams = [0, 1, 2] if output is None else [nothing, output.fileno(), output.fileno()]
            with self._lock:
                if self.gone:
                    raise _GoneError
                try:
                    socket.send_fds(self._socket, [HEADER.pack(len(body))], [*streams, *kept.values()])
                    self._socket.sendall(body)
                except OSError:
                    self._lose()
                    raise _GoneError from None
                pid = self._hear_of_start()
                # Messages are in order: its end was not told before its start.
                self._running[pid] = made = _Forked(self, pid)
                return made
        finally:
            os.close(nothing)

    def _hear_of_start(self) -> int:
        until = time.monotonic() + _PATIENCE
        while True:
            while (message := self._next()) is not None:
                if "failed" in message:
                    raise OSError(int(message["failed"]), f"cannot fork: {os.strerror(int(message['failed']))}")
                if "started" in message:
                    return int(message["started"])
                self._end(message)
            if self.gone or time.monotonic() > until:
                self._process.kill()  # it must not fork late, when another was started instead
                self._lose()
                raise _GoneError
            self._receive(until - time.monotonic())

    def look(self) -> None:
        """Hear who has ended."""
        with self._lock:
            self._receive(0)
            while (message := self._next()) is not None:
                self._end(message)

    def _end(self, message: Mapping[str, Any]) -> None:
        if (process := self._running.pop(int(message["ended"]), None)) is not None:
            process.code = int(message["code"])

    def _receive(self, seconds: float) -> None:
        if not self.gone and _readable(self._socket.fileno(), seconds):
            try:
                more = self._socket.recv(1 << 16)
            except OSError:
                more = b""
            self._heard += more
            if not more:
                self._lose()

    def _next(self) -> dict[str, Any] | None:
        line, end, rest = self._heard.partition(b"\n")
        if not end:
            return None
        self._heard = rest
        found: dict[str, Any] = json.loads(line)
        return found

    def _lose(self) -> None:
        self.gone = True
        self._socket.close()
        self._process.poll()

    def close(self) -> None:
        """End it; what it has forked goes on."""
        with self._lock:
            self._process.kill()  # it may be in the midst of its imports, for which nobody waits any more
            self._lose()
        self._process.wait()


_servers: dict[tuple[int, tuple[tuple[str, str], ...]], _Server] = {}
_making = threading.Lock()


def _server_for(environment: Mapping[str, str]) -> _Server:
    """The one whose libraries have read the same variables. A fork of this process has none of its own yet."""
    read = tuple(sorted((name, value) for name, value in environment.items() if name.startswith(_READ_EARLY)))
    with _making:
        found = _servers.get(key := (os.getpid(), read))
        if found is None or found.gone:
            found = _servers[key] = _Server(environment)
        return found


@atexit.register
def _close_all() -> None:
    for (pid, _), server in _servers.items():
        if pid == os.getpid():
            server.close()
