"""Saving while training goes on: what the run waits for is a copy into host memory, or what is left of it."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from resilin.checkpoint.folder import CheckpointFolder
from resilin.checkpoint.sharded import Buffers
from resilin.checkpoint.staging import Staging
from resilin.checkpoint.store import SavedCheckpoint
from resilin.layout import Layout
from resilin.nouns import Deferred

_NICENESS = 5


def _give_way() -> None:
    """Let the computation go first where there are not enough cores for both.

    Measured on two cores with two computing threads, 0.5 GB: the step beside a save took 0.10 s longer instead of
    0.20 s, and the steps until all was written 0.25 s instead of 0.31 s; more niceness only made the writing slower.
    """
    if sys.platform == "linux":  # elsewhere it is the niceness of the whole process
        thread = threading.get_native_id()
        with suppress(OSError):  # a sandbox may know no priorities
            os.setpriority(os.PRIO_PROCESS, thread, max(_NICENESS, os.getpriority(os.PRIO_PROCESS, thread)))


def _defers(node: Any) -> bool:
    if isinstance(node, Mapping):
        return any(map(_defers, node.values()))
    return any(map(_defers, node)) if isinstance(node, list) else isinstance(node, Deferred)


@dataclass(frozen=True)
class Pending:
    """A save that was begun.

    Attributes:
        step: steps committed in it.
        seconds: how long the run waited: for the save before it, and for what was copied at once.
    """

    step: int
    seconds: float


class BackgroundSaves:
    """Saves into a `CheckpointFolder` from a thread of its own, one at a time.

        saves = BackgroundSaves(CheckpointFolder("checkpoints"))
        saves.save(100, state)  # returns when everything is copied; the tensors may change at once
        saves.poll()            # a SavedCheckpoint once it is safe on disk, None before
        saves.close()           # waits for what is under way

    What stays as it is for a while can be copied meanwhile, so that hardly anything is waited for:

        saves.save(100, state, steady=[*model.parameters(), *moments])
        loss(model, batch).backward()
        saves.staged()  # from here on they may change; returns at once where all is copied
        optimizer.step()

    A save that comes while one is under way waits for it: checkpoints never pile up. An error in the background is
    raised by the next `save`, `poll`, `wait` or `close`; what was committed before stays as it was, and the caller's
    state is untouched, so that the same step can be saved again.

    With several ranks each has one over a folder of the same coordinator, whose group is used from the thread: it must
    be the group of nothing else, and `wait` comes before anything else that the ranks do with the folder together.

    A state with `Deferred` tensors is not copied, as it may be larger than memory: it is written while the run waits.

    Args:
        folder: where to save.
    """

    def __init__(self, folder: CheckpointFolder) -> None:
        self.folder = folder
        self._staging = Staging()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint", initializer=_give_way)
        self._running: Future[SavedCheckpoint] | None = None
        self._done: list[SavedCheckpoint] = []

    def save(
        self,
        step: int,
        tree: Mapping[str, Any],
        layout: Layout | None = None,
        *,
        buffers: Buffers | None = None,
        steady: Iterable[Tensor] = (),
    ) -> Pending:
        """Copy a state and begin to write it.

        Args:
            step: as for `CheckpointFolder.save`.
            tree: as there.
            layout: as there.
            buffers: as there.
            steady: tensors whose memory nobody changes before `staged`; whatever of the state lies in it is copied
                until then. A change all the same is found by torch's counters of changes in place (`Tensor._version`)
                and, on CPUs, in a few elements of each tensor: the save then fails, by the tensor's name.

        Raises:
            CheckpointError: the save before this one failed (this one is then not begun), or this state cannot be
                saved.
        """
        started = time.perf_counter()
        self._settle()
        if _defers(tree):
            self._done.append(self.folder.save(step, tree, layout, buffers=buffers))
            return Pending(step, time.perf_counter() - started)
        copy = partial(self._staging.copy, steady=steady)
        share = self.folder.prepare(step, tree, layout, buffers=buffers, copy=copy)
        self._running = self._thread.submit(self.folder.write, step, share)
        return Pending(step, time.perf_counter() - started)

    def staged(self) -> float:
        """Return when the steady tensors may be changed, and take part in what is left to copy.

        On a GPU it is the current stream that waits, and what it does next may change them.

        Returns:
            How long that took, in seconds.
        """
        started = time.perf_counter()
        self._staging.finish()
        return time.perf_counter() - started

    def poll(self) -> SavedCheckpoint | None:
        """A checkpoint that became safe since the last call, or None; never waits.

        Raises:
            CheckpointError: a save failed.
        """
        if self._running is not None and self._running.done():
            self._settle()
        return self._done.pop(0) if self._done else None

    def wait(self) -> None:
        """Wait until nothing is under way; `poll` then tells of what became safe.

        Raises:
            CheckpointError: a save failed.
        """
        self._settle()

    def close(self) -> None:
        """Wait for what is under way, and end the thread; the folder stays open.

        Raises:
            CheckpointError: a save failed.
        """
        try:
            self._settle()
        finally:
            self._thread.shutdown()

    def _settle(self) -> None:
        if self._running is None:
            return
        wait([self._running])  # an interrupt here leaves it to be waited for again
        running, self._running = self._running, None
        self._done.append(running.result())
