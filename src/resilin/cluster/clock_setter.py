"""Hands the clocks that were decided on to the user's function, in a thread of its own, and in the end the usual ones.

A function may take its time, or fail: the run goes on meanwhile, and what it failed with is in the log.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from resilin.cluster.axes import ClocksHook

_PATIENCE = 30.0  # seconds that the last call may take

Stages = Sequence[Mapping[str, Any]]
"""For each stage `stage`, `members`, `clock` and `usual`."""


class ClockSetter:
    """Calls a hook.

    Args:
        hook: of the user.
        note: told of every call that failed: a word, and facts.
    """

    def __init__(self, hook: ClocksHook, note: Callable[[str, Mapping[str, Any]], None]) -> None:
        self._hook, self._note = hook, note
        self._todo: queue.SimpleQueue[Stages | None] = queue.SimpleQueue()
        self._last: Stages = ()
        self._thread = threading.Thread(target=self._go, name="resilin-clocks", daemon=True)
        self._thread.start()

    def set(self, stages: Stages) -> None:
        """Hand over; returns at once."""
        self._last = stages
        self._todo.put(stages)

    def close(self) -> None:
        """The run is over: whoever has another clock than the usual one gets that again."""
        if any(one["clock"] != one["usual"] for one in self._last):
            self._todo.put([{**one, "clock": one["usual"]} for one in self._last])
        self._todo.put(None)
        self._thread.join(_PATIENCE)

    def _go(self) -> None:
        while (stages := self._todo.get()) is not None:
            try:
                self._hook(stages)
            except Exception as error:
                clocks = [one["clock"] for one in stages]
                self._note("clocks_failed", {"why": f"{type(error).__name__}: {error}", "clocks": clocks})
