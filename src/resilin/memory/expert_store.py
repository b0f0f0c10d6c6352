"""Experts' states on disk, whole whenever the process dies.

A layer is one raw file, mapped into memory. Every expert has two slots in it; what is written goes to the slot that the
last commit does not name, so that a commit is a record of which slot holds what, and nothing is ever overwritten that
the last commit needs. Records alternate between two places with a checksum each: one that was torn is not believed.
With one slot each the files are scratch: half as large, and nothing is committed.
"""

from __future__ import annotations

import fcntl
import json
import mmap
import os
import struct
import threading
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import xxhash
from torch import Tensor

from resilin.config import UserError
from resilin.memory.cache_policy import Key

_PAGE = 4096
_SHAPE_NAME, _COMMIT_NAME, _LOCK_NAME = "shape.json", "commits.raw", "lock"
_HEAD = struct.Struct("<QQQ")  # checksum, sequence number, step


class StoreError(UserError):
    """A folder that is not what it should be."""


@dataclass(frozen=True)
class Geometry:
    """Attributes:
    layers: with experts.
    experts: of each.
    record_bytes: of one expert's state.
    slots: of each expert: 2, or 1 where nothing is to outlive the process.
    """

    layers: int
    experts: int
    record_bytes: int
    slots: int = 2

    @property
    def slot_bytes(self) -> int:
        """Of one of an expert's slots."""
        return -(-self.record_bytes // _PAGE) * _PAGE

    @property
    def disk_bytes(self) -> int:
        """Of all files of experts."""
        return self.slots * self.slot_bytes * self.experts * self.layers


def clear(folder: Path) -> None:
    """Remove the files of a store, and its folder where nothing else is in it."""
    for path in (folder / _SHAPE_NAME, folder / _COMMIT_NAME, folder / _LOCK_NAME, *folder.glob("layer-*.raw")):
        path.unlink(missing_ok=True)
    with suppress(OSError):
        folder.rmdir()


def clear_abandoned(folders: Iterable[Path]) -> None:
    """Remove those stores whose process is gone."""
    for folder in folders:
        with suppress(OSError):
            handle = os.open(folder / _LOCK_NAME, os.O_RDWR | os.O_CLOEXEC)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                clear(folder)
            finally:
                os.close(handle)


class ExpertStore:
    """The lowest tier: states of all experts, as bytes.

    Calls for different experts may come from different threads; calls for one expert, one after the other.

    Args:
        folder: made, or opened where it holds a store; made anew where the geometry has one slot.
        geometry: of what is stored.
        bytes_per_second: reads are slowed down to this rate, to stand in for a slower disk; None: as fast as it goes.

    Raises:
        StoreError: the folder holds a store of another shape, or none that is whole, or another process has it.
    """

    def __init__(self, folder: Path, geometry: Geometry, bytes_per_second: float | None = None) -> None:
        self.folder, self.geometry, self.bytes_per_second = folder, geometry, bytes_per_second
        self.step = 0
        self.read_bytes = self.written_bytes = 0
        self._lock, scratch = threading.Lock(), geometry.slots == 1
        self._committed = np.zeros((geometry.layers, geometry.experts), dtype=np.uint8)
        self._sequence = 0
        folder.mkdir(parents=True, exist_ok=True)
        self._lock_handle = os.open(folder / _LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(self._lock_handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._lock_handle)
            raise StoreError(f"{folder}: another process trains on these experts: use another folder") from None
        fresh = scratch or not (folder / _SHAPE_NAME).exists()
        if fresh:
            self._make()
        else:
            self._check()
        self._maps = [self._map(layer) for layer in range(geometry.layers)]
        self._commits = os.open(folder / _COMMIT_NAME, os.O_RDWR | os.O_CLOEXEC)
        if not fresh:
            self._recover()
        self._working = self._committed.copy()
        self._free_at = 0.0

    @property
    def fresh(self) -> bool:
        """Whether nothing was ever committed."""
        return self._sequence == 0

    def read(self, key: Key, into: Tensor) -> None:
        """The state that was written last, since the last commit or before.

        Args:
            key: whose.
            into: uint8, of `record_bytes`.
        """
        begin = self._begin(key, int(self._working[key]))
        into.copy_(self._maps[key[0]][begin : begin + len(into)])
        with self._lock:
            self.read_bytes += len(into)
            free_at = self._free_at
            if self.bytes_per_second is not None:  # as one disk: requests follow each other, whoever makes them
                free_at = self._free_at = max(free_at, time.perf_counter()) + len(into) / self.bytes_per_second
        left = free_at - time.perf_counter()
        if left > 0:
            time.sleep(left)

    def write(self, key: Key, state: Tensor) -> None:
        """A new state; with two slots, the committed one stays until the next commit.

        Args:
            key: whose.
            state: uint8, of `record_bytes`.
        """
        slot = (1 - int(self._committed[key])) % self.geometry.slots
        begin = self._begin(key, slot)
        self._maps[key[0]][begin : begin + len(state)].copy_(state)
        self._working[key] = slot
        with self._lock:
            self.written_bytes += len(state)

    def view(self, key: Key) -> Tensor:
        """The state that was written last, uint8 of `record_bytes`, where it lies: pages come when looked at."""
        begin = self._begin(key, int(self._working[key]))
        return self._maps[key[0]][begin : begin + self.geometry.record_bytes]

    def commit(self, step: int) -> None:
        """From now on, what was written counts, whatever happens.

        Args:
            step: that the states are of.

        Raises:
            StoreError: there is one slot only, which the next write changes.
        """
        if self.geometry.slots < 2:
            raise StoreError(
                f"{self.folder}: is scratch, with one slot for each expert: nothing can be committed to it"
            )
        for layer in np.flatnonzero((self._working != self._committed).any(1)).tolist():
            handle = os.open(self._path(layer), os.O_RDWR | os.O_CLOEXEC)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)
        self._sequence += 1
        body = _HEAD.pack(0, self._sequence, step)[8:] + self._working.tobytes()
        record = struct.pack("<Q", xxhash.xxh3_64_intdigest(body)) + body
        os.pwrite(self._commits, record, (self._sequence % 2) * self._record_room)
        os.fsync(self._commits)
        self._committed[:] = self._working
        self.step = step

    def close(self) -> None:
        """Let go of the files."""
        self._maps.clear()
        if self._commits >= 0:
            os.close(self._commits)
            os.close(self._lock_handle)
            self._commits = -1

    @property
    def _record_room(self) -> int:
        return -(-(_HEAD.size + self._committed.size) // _PAGE) * _PAGE

    def _begin(self, key: Key, slot: int) -> int:
        return (self.geometry.slots * key[1] + slot) * self.geometry.slot_bytes

    def _path(self, layer: int) -> Path:
        return self.folder / f"layer-{layer:05d}.raw"

    def _make(self) -> None:
        size = self.geometry.slots * self.geometry.slot_bytes * self.geometry.experts
        sizes = {self._path(layer): size for layer in range(self.geometry.layers)}
        for path, length in (sizes | {self.folder / _COMMIT_NAME: 2 * self._record_room}).items():
            with path.open("wb") as file:
                file.truncate(length)
        # Last, so that a folder with a shape has all its files.
        (self.folder / _SHAPE_NAME).write_text(json.dumps(vars(self.geometry)) + "\n", encoding="utf-8")

    def _check(self) -> None:
        found = json.loads((self.folder / _SHAPE_NAME).read_text(encoding="utf-8"))
        if found != vars(self.geometry):
            raise StoreError(f"{self.folder}: holds {found}, and {vars(self.geometry)} is wanted: use another folder")

    def _map(self, layer: int) -> Tensor:
        with self._path(layer).open("r+b") as file:
            return torch.frombuffer(mmap.mmap(file.fileno(), 0), dtype=torch.uint8)

    def _recover(self) -> None:
        """The newest record that is whole."""
        for place in range(2):
            raw = os.pread(self._commits, _HEAD.size + self._committed.size, place * self._record_room)
            if len(raw) < _HEAD.size + self._committed.size:
                continue
            checksum, sequence, step = _HEAD.unpack_from(raw)
            if sequence > self._sequence and checksum == xxhash.xxh3_64_intdigest(raw[8:]):
                self._sequence, self.step = sequence, step
                self._committed[:] = np.frombuffer(raw, np.uint8, offset=_HEAD.size).reshape(self._committed.shape)
