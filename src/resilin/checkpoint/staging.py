"""Copies of what is to be written, in memory of our own, so that training can go on while it is written."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor

from resilin.checkpoint.dtensor import is_dtensor, local_part
from resilin.checkpoint.late_copies import LateCopies, row_order
from resilin.checkpoint.share import Piece, Share

_ALIGN = 64
_LATE_BYTES = 64 << 10  # a smaller tensor is copied sooner than it is put off


def memory_of(tensor: Tensor) -> tuple[torch.device, int] | None:
    """Equal for tensors that lie in the same memory; None for those that have none of their own.

    A tensor of another class (quantised, sparse) says nothing of its memory.
    """
    tensor = local_part(tensor)
    if type(tensor) not in (Tensor, torch.nn.Parameter, torch.nn.Buffer) or tensor.layout != torch.strided:
        return None
    address = tensor.untyped_storage().data_ptr() if not tensor.is_meta else 0
    return (tensor.device, address) if address else None


class Staging:
    """Host memory that is kept from save to save.

    A copy is always a copy: a CPU tensor is cloned, never aliased. From a GPU the current stream copies: what it is
    told to do afterwards may change the tensors. Memory for a state on a GPU is pinned, so that the transfer runs at
    the speed of the bus.
    """

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8)
        self._late = LateCopies()
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    def copy(self, share: Share, steady: Iterable[Tensor] = ()) -> Share:
        """The same share over copies, which are good until the next call.

        The memory is as large as everything the rank writes; it is allocated at the first save and kept.

        Args:
            share: what to copy.
            steady: tensors whose memory nobody changes before `finish`: its copies are complete only when `ready` of
                the share that is returned has been called.
        """
        owners = _owners(steady)
        starts, total = [], 0
        for piece in share.pieces:
            starts.append(total)
            total += -(-piece.bytes // _ALIGN) * _ALIGN
        self._late = LateCopies()  # what is left of another save holds its tensors
        if self._memory.numel() < total:
            self._memory = torch.empty(0, dtype=torch.uint8)  # the old memory is free before the new is asked for
            on_gpu = any(piece.read().is_cuda for piece in share.pieces[:1])
            self._memory = torch.empty(total, dtype=torch.uint8, pin_memory=on_gpu)
        late, devices = LateCopies(), set[torch.device]()
        pieces = tuple(
            self._staged(piece, start, owners, late, devices) for piece, start in zip(share.pieces, starts, strict=True)
        )
        late.begin(self._streams)
        events = [torch.cuda.current_stream(device).record_event() for device in devices]
        scalars = {name: tensor.detach().to("cpu", copy=True) for name, tensor in share.scalars.items()}

        def ready() -> None:
            late.complete()
            for event in events:
                event.synchronize()

        self._late = late
        return replace(share, pieces=pieces, scalars=scalars, ready=ready)

    def finish(self) -> None:
        """Return when the steady tensors of the last `copy` may be changed (`LateCopies.finish`)."""
        self._late.finish()

    def _staged(
        self,
        piece: Piece,
        start: int,
        owners: dict[tuple[torch.device, int], list[Tensor]],
        late: LateCopies,
        devices: set[torch.device],
    ) -> Piece:
        source = piece.read().detach().resolve_conj().resolve_neg()
        if not piece.bytes:
            empty = torch.empty_like(source, device="cpu")
            return replace(piece, read=lambda: empty)
        # The narrowest types can do little but be viewed.
        given = source.view(torch.uint8) if source.element_size() == 1 else source
        room = self._memory[start : start + piece.bytes].view(given.dtype)
        # Memory without gaps is copied as it lies, whatever the order of its dimensions.
        target = room.as_strided(given.shape, given.stride()) if row_order(given) else room.reshape(given.shape)
        where = memory_of(given)
        if where in owners and piece.bytes >= _LATE_BYTES and given.device.type in ("cpu", "cuda"):
            late.add(piece.tensor, given, target, owners[where])
        else:
            target.copy_(given, non_blocking=given.is_cuda)
            if given.is_cuda:
                devices.add(given.device)
        copy = target.view(piece.dtype)
        return replace(piece, read=lambda: copy)


def _owners(steady: Iterable[Tensor]) -> dict[tuple[torch.device, int], list[Tensor]]:
    """The memory that is steady, each with the DTensors over it: they count changes by themselves."""
    found: dict[tuple[torch.device, int], list[Tensor]] = {}
    for tensor in steady:
        where = memory_of(tensor)
        if where is not None and not tensor.is_inference():  # which counts no changes
            found.setdefault(where, []).extend([tensor] if is_dtensor(tensor) else [])
    return found
