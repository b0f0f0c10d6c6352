"""Ctrl-C and polite termination: the first asks the run to finish its step, a second Ctrl-C ends it at once.

Only Ctrl-C is counted. Slurm and others send SIGTERM, or SIGUSR1, to every process of a job, and launchers pass on to
their workers what they are sent themselves, so that two of these may well be one wish; whoever loses patience kills.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Self

from resilin.cluster.failure import REPORT
from resilin.cluster.position import MEMBER

EXIT_INTERRUPTED = 130
_POLITE = (signal.SIGTERM, signal.SIGUSR1)


def _say(text: str) -> None:
    # Through sys.stderr, since a live display puts what is written there above itself; a bare write would tear it.
    try:
        sys.stderr.write(text)
        sys.stderr.flush()
    except (RuntimeError, OSError, ValueError):  # the signal came in the middle of another write to it
        os.write(2, b"\n" + text.encode())


class Interrupts:
    """While entered, SIGINT, SIGTERM and SIGUSR1 set `requested` and `number`; SIGINT after that ends with code 130.

    In a worker that a launcher of ours has started it does not: the launcher itself kills all at the second.

    Args:
        terminated: called for SIGTERM and SIGUSR1 instead; None: they are taken like SIGINT.
    """

    def __init__(self, terminated: Callable[[], None] | None = None) -> None:
        self._terminated = terminated
        self._launched = MEMBER in os.environ or REPORT in os.environ
        self.requested: str | None = None
        self.number = 0
        self._previous: dict[int, object] = {}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number in _POLITE and self._terminated is not None:
            self._terminated()
            return
        if self.requested is not None and (number in _POLITE or self._launched):
            return
        if self.requested is not None:
            os.write(2, b"\nsecond interrupt: ending at once; the last saved checkpoint is unaffected\n")
            os._exit(EXIT_INTERRUPTED)
        self.requested, self.number = signal.Signals(number).name, number
        _say("interrupted: finishing this step, then saving (once more to end at once)\n")

    def __enter__(self) -> Self:
        for number in (signal.SIGINT, *_POLITE):
            try:
                self._previous[number] = signal.signal(number, self._handle)
            except ValueError:  # not the main thread: whoever owns the signals decides
                break
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for number, previous in self._previous.items():
            signal.signal(number, previous)  # type: ignore[arg-type]
        self._previous.clear()
