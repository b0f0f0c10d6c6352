"""The middle tier: the states of some experts in host memory, read ahead and written back by a thread of their own."""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from resilin.memory.cache_policy import CachePolicy, Key
from resilin.memory.expert_store import ExpertStore


@dataclass
class CacheCounts:
    """What happened since the start.

    Attributes:
        hits: states that were there when they were needed, or on their way.
        misses: states that were read while somebody waited.
        ahead: states that were read before they were needed.
        streamed: of the misses, those that found no place: all entries were in use.
        stall_s: seconds that somebody waited for the disk.
    """

    hits: int = 0
    misses: int = 0
    ahead: int = 0
    streamed: int = 0
    stall_s: float = 0.0

    @property
    def hit_rate(self) -> float:
        """Hits among all requests; NaN where there were none."""
        asked = self.hits + self.misses
        return self.hits / asked if asked else float("nan")


class HostCache:
    """States of experts, by layer and expert.

    Decisions are made when something is asked for, by the caller; only bytes are moved by the thread, in the order in
    which that was decided. So what is in the cache does not depend on how fast the disk is, and no state is read before
    its last version is written.

    Args:
        store: holds all of them.
        policy: says who leaves.
        pin_memory: whether buffers are pinned, for copies to a GPU.
    """

    def __init__(self, store: ExpertStore, policy: CachePolicy, pin_memory: bool = False) -> None:
        self.store, self.policy, self.counts = store, policy, CacheCounts()
        self._pin_memory = pin_memory
        self._states: dict[Key, Tensor] = {}
        self._coming: dict[Key, Future[None]] = {}
        self._going: dict[Key, Future[None]] = {}
        self._dirty: set[Key] = set()
        self._changed: set[Key] = set()
        self._pins: Counter[Key] = Counter()
        self._ahead: dict[Key, int] = {}
        self._spare: list[Tensor] = []
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="experts")
        self._leaving: deque[tuple[Future[None], Tensor]] = deque()
        self._made = 0
        self._beside: Tensor | None = None

    @property
    def bytes(self) -> int:
        """Of all buffers: those that are made stay."""
        return (self._made + (self._beside is not None)) * self.store.geometry.record_bytes

    def read_ahead(self, keys: list[Key]) -> None:
        """Ask for states that will be needed: they are kept from now until `forget_ahead`.

        Args:
            keys: in the order in which they will be needed.
        """
        for key in keys:
            if key in self._ahead:
                continue
            decision = self.policy.get(key, self._pins)
            if not decision.cached:
                continue
            self._ahead[key] = 1
            self._pins[key] += 1
            if decision.hit:
                continue
            self._evict(decision.evicted)
            self._states[key] = self._buffer()
            self._coming[key] = self._thread.submit(self.store.read, key, self._states[key])
            self.counts.ahead += 1

    def forget_ahead(self) -> None:
        """What was read ahead may leave again, whether it was needed or not."""
        for key in list(self._ahead):
            del self._ahead[key]
            self._unpin(key)

    @contextmanager
    def state(self, key: Key, *, change: bool = False) -> Iterator[Tensor]:
        """One state, uint8 of `record_bytes`, which stays where it is within the block.

        Args:
            key: whose.
            change: whether it is changed within the block.
        """
        state, cached = self._get(key)
        self._pins[key] += 1
        try:
            yield state
        finally:
            self._unpin(key)
            change = change or key in self._changed
            self._changed.discard(key)
            if change and cached:
                self._dirty.add(key)
            elif change:
                self._write(key, state)
            if not cached:
                self._retire(key, state)

    def changed(self, key: Key) -> None:
        """Within the block of `state`: it was changed after all."""
        self._changed.add(key)

    @contextmanager
    def aside(self, key: Key, *, change: bool = False) -> Iterator[Tensor]:
        """One state as `state` gives it, of which the policy does not hear: what is cached stays the same.

        Args:
            key: whose.
            change: whether it is changed within the block.
        """
        if key in self._states:
            self._arrived(key)
            yield self._states[key]
            if change:
                self._dirty.add(key)
            return
        if key in self._going:
            self._going[key].result()
        if self._beside is None:
            self._beside = torch.empty(self.store.geometry.record_bytes, dtype=torch.uint8)
        self.store.read(key, self._beside)
        yield self._beside
        if change:
            self.store.write(key, self._beside)

    def flush(self) -> None:
        """Write what was changed, so that the store has the present states."""
        began = time.perf_counter()
        for key in sorted(self._dirty):
            self._write(key, self._states[key])
        self._dirty.clear()
        self._settle()
        self.counts.stall_s += time.perf_counter() - began

    def write_back(self, step: int) -> None:
        """Write what was changed, and commit it.

        Args:
            step: that the states are of.
        """
        self.flush()
        began = time.perf_counter()
        self.store.commit(step)
        self.counts.stall_s += time.perf_counter() - began

    def close(self) -> None:
        """Wait for the thread; what was not written back is lost, as it is when the process dies."""
        self._thread.shutdown(wait=True)

    def _get(self, key: Key) -> tuple[Tensor, bool]:
        if key in self._ahead or (key in self._states and key in self._pins):
            known = self._states[key]
            self.counts.hits += 1
            self._arrived(key)
            return known, True
        decision = self.policy.get(key, self._pins)
        if decision.hit:
            self.counts.hits += 1
            self._arrived(key)
            return self._states[key], True
        self.counts.misses += 1
        self._evict(decision.evicted)
        state = self._buffer()
        began = time.perf_counter()
        written = self._going.get(key)
        if written is not None:
            written.result()
        self.store.read(key, state)
        self.counts.stall_s += time.perf_counter() - began
        if decision.cached:
            self._states[key] = state
        else:
            self.counts.streamed += 1
        return state, decision.cached

    def _arrived(self, key: Key) -> None:
        coming = self._coming.pop(key, None)
        if coming is not None:
            began = time.perf_counter()
            coming.result()
            self.counts.stall_s += time.perf_counter() - began

    def _unpin(self, key: Key) -> None:
        self._pins[key] -= 1
        if not self._pins[key]:
            del self._pins[key]

    def _evict(self, key: Key | None) -> None:
        if key is None:
            return
        self._arrived(key)  # read ahead, and never needed
        state = self._states.pop(key)
        if key in self._dirty:
            self._dirty.discard(key)
            self._write(key, state)
        self._retire(key, state)

    def _write(self, key: Key, state: Tensor) -> None:
        self._going[key] = self._thread.submit(self.store.write, key, state)

    def _retire(self, key: Key, state: Tensor) -> None:
        """The buffer can be used again, once it is written."""
        going = self._going.get(key)
        if going is None or _finished(going):
            self._spare.append(state)
        else:
            self._leaving.append((going, state))

    def _buffer(self) -> Tensor:
        while self._leaving and (_finished(self._leaving[0][0]) or not self._may_make()):
            going, state = self._leaving.popleft()
            began = time.perf_counter()
            going.result()
            self.counts.stall_s += time.perf_counter() - began
            self._spare.append(state)
        self._going = {key: going for key, going in self._going.items() if not _finished(going)}
        if self._spare:
            return self._spare.pop()
        self._made += 1
        return torch.empty(self.store.geometry.record_bytes, dtype=torch.uint8, pin_memory=self._pin_memory)

    def _may_make(self) -> bool:
        """Whether there may be more buffers: those of the cache, one that leaves, and one that only passes."""
        return bool(self._spare) or self._made < self.policy.capacity + 2

    def _settle(self) -> None:
        for going in self._going.values():
            going.result()
        self._going.clear()


def _finished(work: Future[None]) -> bool:
    if not work.done():
        return False
    work.result()  # an error of the thread is raised where it is seen first
    return True
