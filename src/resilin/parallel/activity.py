"""What this process is doing now, for whoever asks when it hangs.

One worker is one process, so what it does is one value of this module. Its main thread sets it, a few times in a
micro-batch (one or two microseconds each); a thread of `resilin.cluster.watch` reads it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import NamedTuple


class Activity(NamedTuple):
    """What a worker does.

    Attributes:
        what: in words and numbers, which are put together when somebody asks.
        waits_for: the workers it waits for, itself perhaps among them; empty: it waits for none.
        since: `time.monotonic()` when that began.
    """

    what: tuple[object, ...]
    waits_for: Sequence[int]
    since: float

    def __str__(self) -> str:
        return " ".join(map(str, self.what))


class _Now:
    __slots__ = ("activity", "place", "step", "told")

    def __init__(self) -> None:
        self.begin()

    def begin(self) -> None:
        self.activity, self.step, self.place = Activity(("starting",), (), time.monotonic()), 0, ""
        self.told: Callable[[str], None] | None = None


now = _Now()
if hasattr(os, "register_at_fork"):
    # A process that is forked begins then, however long whoever forked it has been there.
    os.register_at_fork(after_in_child=now.begin)
"""activity: what is done; step: the step it is for; place: of this worker in words ("pipeline stage 1, data 0");
told: called with whatever is begun, in words, if it is set."""


def doing(*what: object) -> None:
    """Say what is done from now on."""
    now.activity = Activity(what, (), time.monotonic())
    if now.told is not None:
        now.told(str(now.activity))


class waiting:  # noqa: N801
    """While entered, this worker cannot go on without others.

    After an error it stays so: that is what the worker failed at.

    Args:
        ranks: their numbers in the whole job; this worker's own may be among them.
        what: what for; nothing: for what is being done.
    """

    __slots__ = ("_before", "_ranks", "_what")

    def __init__(self, ranks: Sequence[int], *what: object) -> None:
        self._ranks, self._what = ranks, what

    def __enter__(self) -> None:
        self._before = now.activity
        now.activity = Activity(self._what or self._before.what, self._ranks, time.monotonic())

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if kind is None:
            now.activity = self._before
