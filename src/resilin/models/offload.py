"""Checkpointed activations in another memory: what a block keeps for the backward pass leaves the device meanwhile.

With `recompute = "block"` a block keeps its input only, and these inputs, layers * tokens * width values, are then what
grows with a row. Here they go to pinned host memory over a stream of their own, or to a file (Bekman et al., Arctic
Long Sequence Training, 2025, section 3.3), and come back one block ahead of the backward pass. The last block's stays:
it is wanted at once. What comes back are the same bits.
"""

from __future__ import annotations

import os
import tempfile
import weakref
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

OffloadKind = Literal["none", "host", "disk"]
_IN_FLIGHT = 2
"""Tensors whose copies may be under way, and so still hold the memory they leave."""
_LEAST = 1024  # bytes


class Store(Protocol):
    """A memory for tensors that are away."""

    def put(self, tensor: Tensor) -> Any:
        """Begin to copy a tensor away; what is given stands for it. The tensor may not be written to afterwards."""

    def begin(self, away: Any) -> None:
        """Begin to bring one back."""

    def get(self, away: Any) -> Tensor:
        """The tensor, on its device; as often as asked."""

    def release(self, away: Any) -> None:
        """The memory may be used for others."""


class _OnDisk:
    """Where a tensor lies in the file."""

    def __init__(self, offset: int, like: Tensor, written: Future[None]) -> None:
        self.offset, self.written = offset, written
        self.shape, self.dtype, self.device, self.nbytes = like.shape, like.dtype, like.device, like.nbytes
        self.coming: Future[Tensor] | None = None


class DiskStore:
    """Tensors in an unnamed file of the folder for temporary files (TMPDIR), written and read by a thread."""

    def __init__(self) -> None:
        self.folder = tempfile.gettempdir()
        self._file = tempfile.TemporaryFile(prefix="resilin-activations-", buffering=0)  # noqa: SIM115 - for good
        self._worker = ThreadPoolExecutor(1, "activations")
        self._free: dict[int, list[int]] = {}
        self._end = 0
        self._under_way: deque[Future[None]] = deque()

    def put(self, tensor: Tensor) -> _OnDisk:
        """Begin to write."""
        while len(self._under_way) >= _IN_FLIGHT:
            self._under_way.popleft().result()
        free = self._free.get(tensor.nbytes)
        if free:
            offset = free.pop()
        else:
            offset, self._end = self._end, self._end + tensor.nbytes
        written = self._worker.submit(self._write, tensor.detach().cpu().contiguous(), offset)
        self._under_way.append(written)
        return _OnDisk(offset, tensor, written)

    def _write(self, tensor: Tensor, offset: int) -> None:
        left = tensor.reshape(-1).view(torch.uint8).numpy().data
        try:
            while left:
                done = os.pwrite(self._file.fileno(), left, offset)
                left, offset = left[done:], offset + done
        except OSError as error:
            raise RuntimeError(
                f"activations could not be written to {self.folder}: {error}; set TMPDIR to a folder on a disk with "
                "room, or model.offload = 'none'"
            ) from error

    def _read(self, away: _OnDisk) -> Tensor:
        raw = torch.empty(away.nbytes, dtype=torch.uint8)
        left, offset = raw.numpy().data, away.offset
        while left:
            done = os.preadv(self._file.fileno(), [left], offset)
            if not done:
                raise RuntimeError(f"the file of activations in {self.folder} ends before what was written to it")
            left, offset = left[done:], offset + done
        return raw.view(away.dtype).view(away.shape).to(away.device)

    def begin(self, away: _OnDisk) -> None:
        """Begin to read."""
        if away.coming is None:
            away.coming = self._worker.submit(self._read, away)

    def get(self, away: _OnDisk) -> Tensor:
        """Wait for it."""
        away.written.result()
        coming, away.coming = away.coming, None
        return coming.result() if coming is not None else self._read(away)

    def release(self, away: _OnDisk) -> None:
        """Its place in the file is free, once nothing is written there any more."""
        away.written.exception()
        self._free.setdefault(away.nbytes, []).append(away.offset)


class _OnHost:
    """A pinned buffer that holds a tensor."""

    def __init__(self, buffer: Tensor, device: torch.device) -> None:
        self.buffer, self.device = buffer, device
        self.coming: tuple[Tensor, torch.cuda.Event] | None = None


class HostStore:
    """Tensors of one GPU in pinned host memory, copied on a stream of their own."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device)
        self._free: dict[tuple[torch.Size, torch.dtype], list[Tensor]] = {}
        self._leaving: deque[tuple[Tensor, torch.cuda.Event]] = deque()

    def put(self, tensor: Tensor) -> _OnHost:
        """Begin to copy; beyond two, the device waits for the oldest and lets go of its memory."""
        free = self._free.get((tensor.shape, tensor.dtype))
        buffer = free.pop() if free else torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        current = torch.cuda.current_stream(self.device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            buffer.copy_(tensor.detach(), non_blocking=True)
        self._leaving.append((tensor.detach(), self._stream.record_event()))
        while len(self._leaving) > _IN_FLIGHT:
            _, left = self._leaving.popleft()
            current.wait_event(left)
        return _OnHost(buffer, tensor.device)

    def begin(self, away: _OnHost) -> None:
        """Begin to copy back."""
        if away.coming is not None:
            return
        current = torch.cuda.current_stream(self.device)
        while self._leaving:
            current.wait_event(self._leaving.popleft()[1])
        tensor = torch.empty(away.buffer.shape, dtype=away.buffer.dtype, device=self.device)
        self._stream.wait_stream(current)  # its memory may have been in use until now
        with torch.cuda.stream(self._stream):
            tensor.copy_(away.buffer, non_blocking=True)
        away.coming = tensor, self._stream.record_event()

    def get(self, away: _OnHost) -> Tensor:
        """The device waits for it, the host does not."""
        self.begin(away)
        assert away.coming is not None
        (tensor, arrived), away.coming = away.coming, None
        torch.cuda.current_stream(self.device).wait_event(arrived)
        return tensor

    def release(self, away: _OnHost) -> None:
        """The buffer is free: what still reads it goes before what writes it next, on the same stream."""
        if away.coming is not None:
            away.coming[1].synchronize()
        self._free.setdefault((away.buffer.shape, away.buffer.dtype), []).append(away.buffer)


_stores: dict[tuple[int, str, torch.device], Store] = {}


def store_for(kind: OffloadKind, device: torch.device) -> Store | None:
    """The process's store of a kind for a device; None where nothing is to leave: a CPU's memory is the host's."""
    if kind == "none" or (kind == "host" and device.type != "cuda"):
        return None
    key = os.getpid(), kind, device
    if key not in _stores:
        _stores[key] = HostStore(device) if kind == "host" else DiskStore()
    return _stores[key]


class _Away:
    """A tensor that is away, for as long as the graph may ask for it."""

    def __init__(self, store: Store, tensor: Tensor, before: weakref.ref[_Away] | None) -> None:
        self.store, self.place, self.before = store, store.put(tensor), before
        weakref.finalize(self, store.release, self.place).atexit = False

    def back(self) -> Tensor:
        """The tensor; the one that left before it, which will be asked for next, is sent for."""
        tensor = self.store.get(self.place)
        before = self.before() if self.before is not None else None
        if before is not None:
            before.store.begin(before.place)
        return tensor


class Offload:
    """The tensors of one forward pass that are away, in order."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self._last: weakref.ref[_Away] | None = None

    def keeping_away(self, tensor: Tensor) -> AbstractContextManager[Any]:
        """While inside, this tensor leaves when autograd keeps it; everything else stays."""

        def mark(x: Tensor) -> tuple[Any, ...]:
            return x.data_ptr(), x.shape, x.stride(), x.dtype

        wanted = mark(tensor)  # the graph keeps these functions: they must not keep the tensor

        def pack(kept: Tensor) -> Tensor | _Away:
            if mark(kept) != wanted or kept.nbytes < _LEAST:
                return kept
            away = _Away(self.store, kept, self._last)
            self._last = weakref.ref(away)
            return away

        def unpack(kept: Tensor | _Away) -> Tensor:
            return kept.back() if isinstance(kept, _Away) else kept

        hooks: Callable[..., AbstractContextManager[Any]] = torch.autograd.graph.saved_tensors_hooks
        return hooks(pack, unpack)
