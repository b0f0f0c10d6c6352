"""Processes forked by `resilin.cluster.fork_server`, from the side of who asks for them and waits for their ends."""

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
from typing import IO, Any

from resilin.cluster.fork_server import HEADER

# By name: they are in layers above. Whatever else a worker needs, it imports itself.
_IMPORTED = ("resilin.cli.main", "resilin.run.elastic_start", "resilin.run.start")
_READ_EARLY = (
    "PYTHON", "OMP_", "KMP_", "GOMP_", "MKL_", "OPENBLAS_", "NUMEXPR_", "TORCH", "PYTORCH", "LD_", "CUDA", "THP_"
)  # fmt: skip
_PATIENCE = 120.0  # seconds that imports may take
_POLL = 0.01
_LOST = 1


def _readable(descriptor: int, seconds: float) -> bool:
    asked = select.poll()  # select() knows the first 1024 descriptors only
    asked.register(descriptor, select.POLLIN)
    return bool(asked.poll(max(0.0, 1000 * seconds)))


class GoneError(Exception):
    """The server could not import, or was killed."""


class Forked:
    """A forked process; see `resilin.cluster.process.Process`.

    Args:
        server: that has forked it.
        pid: its number.
    """

    def __init__(self, server: ForkServer, pid: int) -> None:
        self.pid, self._server = pid, server
        self.code: int | None = None
        self._handle: int | None = None
        with suppress(ProcessLookupError):  # once it has ended, its number may be another's
            self._handle = os.pidfd_open(pid)

    def poll(self) -> int | None:
        """Its exit code, negative for a signal; None while it runs; 1 where the server was killed and none saw how."""
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
        handle, self._handle = self._handle, None
        if handle is not None:
            os.close(handle)

    def wait(self) -> int:
        """The same, once it has ended."""
        while (code := self.poll()) is None:
            time.sleep(_POLL)
        return code

    def send_signal(self, sig: int, /) -> None:
        """Send a signal, unless it has ended."""
        with suppress(ProcessLookupError):
            if self.poll() is None and self._handle is not None:
                signal.pidfd_send_signal(self._handle, sig)

    def kill(self) -> None:
        """Send SIGKILL."""
        self.send_signal(signal.SIGKILL)

    def __del__(self) -> None:
        self._let_go()


class ForkServer:
    """One fork server, from the side of who asks it.

    Args:
        environment: it begins with.

    Attributes:
        gone: whether it has ended; what it has forked goes on.
        process: its own.
    """

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._lock = threading.RLock()
        self._running: dict[int, Forked] = {}
        self._heard = b""
        self.gone = False
        self._socket, theirs = socket.socketpair()
        with theirs:
            self.process = subprocess.Popen(
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
    ) -> Forked:
        """Fork.

        Args:
            module: that is run, as by `python -m`.
            arguments: for it.
            environment: all variables.
            output: where it writes; None: to the terminal of this process.
            kept: by variable a descriptor that it inherits.

        Raises:
            GoneError: the server is gone.
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
                    raise GoneError
                try:
                    socket.send_fds(self._socket, [HEADER.pack(len(body))], [*streams, *kept.values()])
                    self._socket.sendall(body)
                except OSError:
                    self._lose()
                    raise GoneError from None
                pid = self._hear_of_start()
                # Messages are in order: its end was not told before its start.
                self._running[pid] = made = Forked(self, pid)
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
                self.process.kill()  # it must not fork late, when another was started instead
                self._lose()
                raise GoneError
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
        self.process.poll()

    def close(self) -> None:
        """End it; what it has forked goes on."""
        with self._lock:
            self.process.kill()  # it may be in the midst of its imports, for which nobody waits any more
            self._lose()
        self.process.wait()


_servers: dict[tuple[int, tuple[tuple[str, str], ...]], ForkServer] = {}
_making = threading.Lock()


def server_for(environment: Mapping[str, str]) -> ForkServer:
    """The one whose libraries have read the same variables. A fork of this process has none of its own yet."""
    read = tuple(sorted((name, value) for name, value in environment.items() if name.startswith(_READ_EARLY)))
    with _making:
        found = _servers.get(key := (os.getpid(), read))
        if found is None or found.gone:
            found = _servers[key] = ForkServer(environment)
        return found


@atexit.register
def _close_all() -> None:
    for (pid, _), server in _servers.items():
        if pid == os.getpid():
            server.close()
