"""Ctrl-C and polite termination: the first asks the run to finish its step, the second ends at once."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Self

EXIT_INTERRUPTED = 130


def _say(text: str) -> None:
    # Through sys.stderr, since a live display puts what is written there above itself; a bare write would tear it.
    try:
        sys.stderr.write(text)
        sys.stderr.flush()
    except (RuntimeError, OSError, ValueError):  # the signal came in the middle of another write to it
        os.write(2, b"\n" + text.encode())


class Interrupts:
    """While entered, SIGINT and SIGTERM set `requested` and `number`; a second one ends the process with code 130.

    Args:
        terminated: called for SIGTERM instead; None: it is taken like SIGINT.
    """

    def __init__(self, terminated: Callable[[], None] | None = None) -> None:
        self._terminated = terminated
        self.requested: str | None = None
        self.number = 0
        self._previous: dict[int, object] = {}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGTERM and self._terminated is not None:
            self._terminated()
            return
        if self.requested is not None:
            os.write(2, b"\nsecond interrupt: ending at once; the last saved checkpoint is unaffected\n")
            os._exit(EXIT_INTERRUPTED)
        self.requested, self.number = signal.Signals(number).name, number
        _say("interrupted: finishing this step, then saving (once more to end at once)\n")

    def __enter__(self) -> Self:
        for number in (signal.SIGINT, signal.SIGTERM):
            try:
                self._previous[number] = signal.signal(number, self._handle)
            except ValueError:  # not the main thread: whoever owns the signals decides
                break
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for number, previous in self._previous.items():
            signal.signal(number, previous)  # type: ignore[arg-type]
        self._previous.clear()
