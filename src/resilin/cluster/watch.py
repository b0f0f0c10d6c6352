"""A worker's quiet thread: it says on the board what the main thread does, so that others can tell if that hangs.

It also ends the worker when that has waited too long: not every wait of every backend ends by itself (a receive of
gloo's does not), or with an exception that Python sees (NCCL's do not).
"""

from __future__ import annotations

import os
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any

from resilin.cluster.board import Board, Status, explain
from resilin.cluster.failure import Kind, StrandedError, kind_of, leave_report
from resilin.parallel.activity import now

_PERIOD = 1.0
_LATER = 2.0  # seconds after the time-out of the collectives themselves, whose exceptions say where they were
_UNINTERESTING = ("/torch/", "/threading.py", "<frozen")


class Watch:
    """From joining to leaving.

    Args:
        store: of the job; a connection of its own is made.
        rank: this worker's number.
        workers: how many there are.
        timeout: seconds that a worker waits for another.
        attempt: which start of the job this is.
    """

    def __init__(self, store: Any, rank: int, workers: int, timeout: float, attempt: str = "0") -> None:
        self._rank, self._timeout = rank, timeout
        self._board = Board(store.clone(), rank, workers, attempt)
        self._main = threading.get_ident()
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._say(Status(rank, told=time.time()))
        self._thread = threading.Thread(target=self._go, name="resilin-watch", daemon=True)
        self._thread.start()

    def failed(self, error: Exception) -> Exception:
        """Tell the others of a failure of this worker.

        Returns:
            The error itself where it is a reason; else one that says what all workers were doing.
        """
        kind = kind_of(error)
        self._stop.set()
        if isinstance(error, StrandedError):
            return error
        if kind == "reason":
            line = next(iter(str(error).strip().splitlines()), "")
            self._say(self._status(f"{type(error).__name__}: {line:.200}"))
            return error
        return StrandedError(kind, self._stranded(kind))

    def close(self) -> None:
        """Stop."""
        self._stop.set()
        self._thread.join(2 * _PERIOD)

    def _stranded(self, kind: Kind) -> str:
        activity = now.activity
        waits = ", ".join(str(rank) for rank in activity.waits_for if rank != self._rank)
        what = f"worker {self._rank}" + (f" ({now.place})" if now.place else "")
        what += f" waited for {self._timeout:g} s (parallel.timeout)" if kind == "timeout" else " lost a connection"
        what += f" to worker {waits}" if waits and kind == "lost" else f" for worker {waits}" if waits else ""
        what += f" in step {now.step}, {activity}"
        try:
            with self._lock:
                statuses = self._board.read()
        except (RuntimeError, ValueError):
            return f"{what}; the first worker, which keeps account of all, cannot be reached either"
        statuses[self._rank] = self._status()
        return f"{what}\n{explain(statuses, self._rank)}"

    def _go(self) -> None:
        while not self._stop.wait(_PERIOD):
            self._say(self._status())
            waits = any(rank != self._rank for rank in now.activity.waits_for)
            if waits and time.monotonic() - now.activity.since > self._timeout + _LATER:
                self._give_up()

    def _give_up(self) -> None:
        told = self._stranded("timeout")
        leave_report(StrandedError("timeout", told), told, 1)
        os.write(2, f"error: {told}\n".encode())
        os._exit(1)

    def _say(self, status: Status) -> None:
        # The first worker, who keeps the store, may be gone: the main thread will notice.
        with suppress(RuntimeError, ValueError), self._lock:
            self._board.say(status)

    def _status(self, failed: str = "") -> Status:
        activity = now.activity
        return Status(
            self._rank, now.place, now.step, str(activity), tuple(activity.waits_for),
            time.monotonic() - activity.since, line_of(sys._current_frames().get(self._main)), time.time(), failed,
        )  # fmt: skip


def line_of(frame: FrameType | None) -> str:
    """Where a thread is, in the innermost code that is neither torch's nor Python's own."""
    innermost = frame
    while frame is not None and any(part in frame.f_code.co_filename for part in _UNINTERESTING):
        frame = frame.f_back
    frame = frame or innermost
    if frame is None:
        return ""
    path = Path(frame.f_code.co_filename)
    name = path.relative_to(Path(__file__).parents[1]) if path.is_relative_to(Path(__file__).parents[1]) else path.name
    return f"{name}:{frame.f_lineno} {frame.f_code.co_name}"
