"""Experts' states on disk, whole whenever the process dies.

A layer is one raw file, mapped into memory. Every expert has two slots in it; what is written goes to the slot that the
last commit does not name, so that a commit is a record of which slot holds what, and nothing is ever overwritten that
the last commit needs. Records alternate between two places with a checksum each: one that was torn is not believed.
"""

from __future__ import annotations

import json
import mmap
import os
import struct
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import xxhash
from torch import Tensor

from resilin.memory.cache_policy import Key

_PAGE = 4096
_SHAPE_NAME, _COMMIT_NAME = "shape.json", "commits.raw"
_HEAD = struct.Struct("<QQQd")  # checksum, sequence number, step, note


class StoreError(Exception):
    """A folder that is not what it should be."""


@dataclass(frozen=True)
class Geometry:
    """Attributes:
    layers: with experts.
    experts: of each.
    record_bytes: of one expert's state.
    """

    layers: int
    experts: int
    record_bytes: int

    @property
    def slot_bytes(self) -> int:
        """Of one of an expert's two slots."""
        return -(-self.record_bytes // _PAGE) * _PAGE

    @property
    def disk_bytes(self) -> int:
        """Of all files of experts."""
        return 2 * self.slot_bytes * self.experts * self.layers


class ExpertStore:
    """The lowest tier: states of all experts, as bytes.

    Calls for different experts may come from different threads; calls for one expert, one after the other.

    Args:
        folder: made, or opened where it holds a store.
        geometry: of what is stored.
        bytes_per_second: reads are slowed down to this rate, to stand in for a slower disk; None: as fast as it goes.

    Raises:
        StoreError: the folder holds a store of another shape, or none that is whole.
    """

    def __init__(self, folder: Path, geometry: Geometry, bytes_per_second: float | None = None) -> None:
        self.folder, self.geometry, self.bytes_per_second = folder, geometry, bytes_per_second
        self.step, self.note = 0, 0.0
        self.read_bytes = self.written_bytes = 0
        self._lock = threading.Lock()
        self._committed = np.zeros((geometry.layers, geometry.experts), dtype=np.uint8)
        self._sequence = 0
        fresh = not (folder / _SHAPE_NAME).exists()
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
        """A new state; the committed one stays until the next commit.

        Args:
            key: whose.
            state: uint8, of `record_bytes`.
        """
        slot = 1 - int(self._committed[key])
        begin = self._begin(key, slot)
        self._maps[key[0]][begin : begin + len(state)].copy_(state)
        self._working[key] = slot
        with self._lock:
            self.written_bytes += len(state)

    def commit(self, step: int, note: float = 0.0) -> None:
        """From now on, what was written counts, whatever happens.

        Args:
            step: that the states are of.
            note: a number kept with them.
        """
        for layer in np.flatnonzero((self._working != self._committed).any(1)).tolist():
            handle = os.open(self._path(layer), os.O_RDWR | os.O_CLOEXEC)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)
        self._sequence += 1
        body = _HEAD.pack(0, self._sequence, step, note)[8:] + self._working.tobytes()
        record = struct.pack("<Q", xxhash.xxh3_64_intdigest(body)) + body
        os.pwrite(self._commits, record, (self._sequence % 2) * self._record_room)
        os.fsync(self._commits)
        self._committed[:] = self._working
        self.step, self.note = step, note

    def close(self) -> None:
        """Let go of the files."""
        self._maps.clear()
        if self._commits >= 0:
            os.close(self._commits)
            self._commits = -1

    @property
    def _record_room(self) -> int:
        return -(-(_HEAD.size + self._committed.size) // _PAGE) * _PAGE

    def _begin(self, key: Key, slot: int) -> int:
        return (2 * key[1] + slot) * self.geometry.slot_bytes

    def _path(self, layer: int) -> Path:
        return self.folder / f"layer-{layer:05d}.raw"

    def _make(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        size = 2 * self.geometry.slot_bytes * self.geometry.experts
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
            checksum, sequence, step, note = _HEAD.unpack_from(raw)
            if sequence > self._sequence and checksum == xxhash.xxh3_64_intdigest(raw[8:]):
                self._sequence, self.step, self.note = sequence, step, note
                self._committed[:] = np.frombuffer(raw, np.uint8, offset=_HEAD.size).reshape(self._committed.shape)
