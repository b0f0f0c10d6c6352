"""A process that has imported what workers need, and forks them: each then starts in milliseconds, not seconds.

Started by `resilin.cluster.process`, with one end of a socket. It has one thread and never computes, so that a fork of
it is as good as a new process. It ends when the other end of the socket is closed; those that it forked go on.
"""

from __future__ import annotations

import gc
import json
import os
import runpy
import select
import signal
import socket
import struct
import sys
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any

HEADER = struct.Struct("!I")
"""Before every request: its length. Descriptors come along with it."""
MOST_DESCRIPTORS = 16
_OTHERS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


def serve(connection: socket.socket) -> dict[str, Any] | None:
    """Fork a process for every request, and tell of its end.

    Args:
        connection: to the one who asks.

    Returns:
        In a forked process the request that it is to serve; None in this one, once nobody asks any more.
    """
    # SIGCHLD wakes select() through this pipe, whenever it comes.
    woken, wakes = os.pipe()
    os.set_blocking(wakes, False)
    os.set_blocking(woken, False)
    signal.set_wakeup_fd(wakes, warn_on_full_buffer=False)
    before = {signal.SIGCHLD: signal.signal(signal.SIGCHLD, lambda *_: None)}
    # What is sent to all processes of a job, as Slurm does, is for those that it forks: without it nobody would know
    # how they end.
    before |= {number: signal.signal(number, signal.SIG_IGN) for number in _OTHERS}
    asked = connection.fileno()
    while True:
        ready, _, _ = select.select([asked, woken], [], [])
        if woken in ready:
            with suppress(BlockingIOError):
                os.read(woken, 4096)
            _tell_ends(connection)
        if asked not in ready:
            continue
        try:
            found = _request(connection)
        except ConnectionError:  # whoever asked has ended without hearing all that it was told
            found = None
        if found is None:
            return None
        request, descriptors = found
        try:
            pid, answer = os.fork(), {}
        except OSError as error:
            pid, answer = -1, {"failed": error.errno}
        if pid:
            for descriptor in descriptors:
                os.close(descriptor)
            _say(connection, answer or {"started": pid})
            continue
        signal.set_wakeup_fd(-1)
        for number, handler in before.items():
            signal.signal(number, handler)
        for mine in (woken, wakes):
            os.close(mine)
        connection.close()
        _become(request, descriptors)
        return request


def _request(connection: socket.socket) -> tuple[dict[str, Any], list[int]] | None:
    head, descriptors, _, _ = socket.recv_fds(connection, HEADER.size, MOST_DESCRIPTORS)
    body = b""
    while head and (len(head) < HEADER.size or len(body) < HEADER.unpack(head)[0]):
        lacking = HEADER.size - len(head)
        more = connection.recv(lacking or HEADER.unpack(head)[0] - len(body))
        if not more:
            return None
        if lacking:
            head += more
        else:
            body += more
    return (json.loads(body), descriptors) if head else None


def _say(connection: socket.socket, message: dict[str, Any]) -> None:
    with suppress(OSError):  # whoever asked may be gone, which is seen next
        connection.sendall(json.dumps(message).encode() + b"\n")


def _tell_ends(connection: socket.socket) -> None:
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if not pid:
            return
        _say(connection, {"ended": pid, "code": os.waitstatus_to_exitcode(status)})


def _become(request: dict[str, Any], descriptors: list[int]) -> None:
    """Make a forked process one that was started as the request says."""
    os.setsid()
    with suppress(OSError):
        Path("/proc/self/comm").write_text("resilin-worker")  # what `top` shows
    for place, descriptor in zip((0, 1, 2), descriptors, strict=False):
        os.dup2(descriptor, place)
        os.close(descriptor)
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])
    for variable, descriptor in zip(request["kept"], descriptors[3:], strict=True):
        os.set_inheritable(descriptor, False)
        os.environ[variable] = str(descriptor)
    sys.path[0] = request["folder"]  # as `python -m` has it
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=os.isatty(stream.fileno()) or stream is sys.stderr)  # type: ignore[union-attr]


def main() -> None:
    """`python -m resilin.cluster.fork_server DESCRIPTOR MODULE...`: import modules, then serve."""
    connection = socket.socket(fileno=int(sys.argv[1]))
    connection.set_inheritable(False)
    for module in sys.argv[2:]:
        import_module(module)
    gc.collect()
    gc.freeze()  # pages that the collector does not touch stay shared
    request = serve(connection)
    if request is None:
        os._exit(0)
    sys.argv = ["", *request["arguments"]]
    runpy.run_module(request["module"], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
