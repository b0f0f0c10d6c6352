"""Copies that may be made late: of memory that stays as it is until its owner asks for them to be finished.

Whoever comes first copies: the thread that writes, from when it was told to; and the thread that is about to change the
memory, which takes part in what is left and then goes on. So the wait is never for a thread that has no processor.

On the CPU the copies are plain ones of a few MiB without the interpreter's lock: torch's own would share the threads of
the step that is computed beside them. From a GPU they run on a stream of their own; whoever is about to change the
memory makes its stream wait, not itself.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from resilin.checkpoint.errors import CheckpointError

_CHUNK_BYTES = 4 << 20
_PLAIN = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.complex128}
_LOOKS = {1: 16, 2: 4}  # elements looked at along each dimension, by the number of dimensions


@dataclass(frozen=True)
class _Watched:
    """What tells whether a tensor was changed: torch's counters of changes in place, and a few elements."""

    name: str
    tensors: tuple[Tensor, ...]
    versions: tuple[int, ...]
    copy: np.ndarray[Any, Any] = field(default_factory=lambda: np.empty(0))
    seen: np.ndarray[Any, Any] | None = None

    @property
    def changed(self) -> bool:
        # Not every kernel counts (fused AdamW does not, nor what is done through `.data`), hence the elements.
        counted = any(tensor._version != was for tensor, was in zip(self.tensors, self.versions, strict=True))
        return counted or (self.seen is not None and not np.array_equal(_look(self.copy), self.seen))


def _look(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """A few elements from all over it, as bytes so that NaNs are equal to themselves."""
    wanted = _LOOKS.get(array.ndim, 2)
    found = array[tuple(slice(None, None, max(1, size // wanted)) for size in array.shape)]
    return np.array(found, order="C").view(np.uint8)


def row_order(tensor: Tensor) -> tuple[int, ...] | None:
    """The order of dimensions in which a tensor lies row by row without gaps or overlaps; None where it has none."""
    sizes, strides = tensor.shape, tensor.stride()
    order = sorted(range(tensor.dim()), key=lambda d: (strides[d], sizes[d]), reverse=True)
    expected = 1
    for dimension in reversed(order):
        if sizes[dimension] != 1 and strides[dimension] != expected:
            return None
        expected *= sizes[dimension]
    return tuple(order)


class LateCopies:
    """The copies of one save that are still to be made."""

    def __init__(self) -> None:
        self._chunks: deque[tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]] = deque()
        self._taken = 0
        self._free = threading.Condition()
        self._watched: list[_Watched] = []
        self._from_gpu: list[tuple[Tensor, Tensor]] = []
        self._events: dict[torch.device, torch.cuda.Event] = {}
        self._changed: str | None = None

    def add(self, name: str, source: Tensor, target: Tensor, owners: Sequence[Tensor] = ()) -> None:
        """One more copy; none is added once they are begun.

        Args:
            name: of the tensor, for errors.
            source: what stays as it is for now.
            target: host memory of the same shape, with the source's strides where these have no gaps.
            owners: tensors of another class over the same memory, whose changes count too.
        """
        tensors = (source, *owners)
        versions = tuple(tensor._version for tensor in tensors)
        if source.is_cuda:
            self._from_gpu.append((target, source))
            self._watched.append(_Watched(name, tensors, versions))
            return
        order = row_order(source)
        kind = _PLAIN[source.element_size()]
        old, new = source.view(kind), target.view(kind)
        if order is not None:
            old, new = old.permute(order).reshape(-1), new.permute(order).reshape(-1)
        old_array, new_array = old.numpy(), new.numpy()
        self._watched.append(_Watched(name, tensors, versions, new_array, _look(old_array)))
        rows = max(1, _CHUNK_BYTES // (old_array.nbytes // len(old_array)))
        for start in range(0, len(old_array), rows):
            self._chunks.append((new_array[start : start + rows], old_array[start : start + rows]))

    def begin(self, streams: dict[torch.device, torch.cuda.Stream]) -> None:
        """Start what a GPU copies by itself: after all that its current stream was told before.

        Args:
            streams: those for copies, by device; made where they are missing.
        """
        for device in {source.device for _, source in self._from_gpu}:
            if device not in streams:
                streams[device] = torch.cuda.Stream(device)
            stream = streams[device]
            stream.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(stream):
                for target, source in self._from_gpu:
                    if source.device == device:
                        target.copy_(source, non_blocking=True)
                self._events[device] = stream.record_event()

    def finish(self) -> None:
        """Return when the memory may be changed; that of a GPU, by what its current stream is told from now on."""
        self._copy_all()
        for device, event in self._events.items():
            torch.cuda.current_stream(device).wait_event(event)
        self._look_for_changes()

    def complete(self) -> None:
        """Return when the copies are complete on the host.

        Raises:
            CheckpointError: a tensor was changed before `finish` was called, so that its copy may be a mixture.
        """
        self._copy_all()
        for event in self._events.values():
            event.synchronize()
        self._look_for_changes()
        self._from_gpu.clear()  # held until here: freed memory might have been used again
        if self._changed is not None:
            raise CheckpointError(
                f"tensor {self._changed!r} was changed while it was being saved: its copy may be part old, part new, "
                "so this state is not saved. What is trained may be changed by the optimizer's step and by a "
                "`before_step` that is not marked `keeps_weights`; who saves without a run calls "
                "`BackgroundSaves.staged` before any change"
            )

    def _copy_all(self) -> None:
        while self._copy_one() or self._given_back():
            pass

    def _copy_one(self) -> bool:
        """Make one of the copies that nobody has taken; whether there was one."""
        with self._free:
            if not self._chunks:
                return False
            chunk = self._chunks.popleft()
            self._taken += 1
        done = False
        try:
            np.copyto(*chunk)
            done = True
        finally:
            with self._free:
                if not done:  # interrupted: another makes it, or whoever asks again
                    self._chunks.appendleft(chunk)
                self._taken -= 1
                self._free.notify_all()
        return True

    def _given_back(self) -> bool:
        """Wait for the copies that others make; whether one of them was interrupted in it."""
        with self._free:
            while self._taken and not self._chunks:
                self._free.wait()
            return bool(self._chunks)

    def _look_for_changes(self) -> None:
        with self._free:  # only the first to come here looks: once `finish` returned, changes are allowed
            self._changed = self._changed or next((one.name for one in self._watched if one.changed), None)
            self._watched.clear()
