"""Copies of what is to be written, in memory of our own, so that training can go on while it is written."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from resilin.checkpoint.share import Piece, Share

_ALIGN = 64


class Staging:
    """Host memory that is kept from save to save.

    A copy is always a copy: a CPU tensor is cloned, never aliased, and a GPU's is on the host, complete, when `copy`
    returns. Memory for a state on a GPU is pinned, so that the transfer runs at the speed of the bus.
    """

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8)

    def copy(self, share: Share) -> Share:
        """The same share over copies, which are good until the next call.

        The memory is as large as everything the rank writes; it is allocated at the first save and kept.
        """
        starts, total = [], 0
        for piece in share.pieces:
            starts.append(total)
            total += -(-piece.bytes // _ALIGN) * _ALIGN
        if self._memory.numel() < total:
            self._memory = torch.empty(0, dtype=torch.uint8)  # the old memory is free before the new is asked for
            on_gpu = any(piece.read().is_cuda for piece in share.pieces[:1])
            self._memory = torch.empty(total, dtype=torch.uint8, pin_memory=on_gpu)
        devices: set[torch.device] = set()
        pieces = tuple(self._staged(piece, start, devices) for piece, start in zip(share.pieces, starts, strict=True))
        for device in devices:
            torch.cuda.synchronize(device)
        scalars = {name: tensor.detach().to("cpu", copy=True) for name, tensor in share.scalars.items()}
        return replace(share, pieces=pieces, scalars=scalars)

    def _staged(self, piece: Piece, start: int, devices: set[torch.device]) -> Piece:
        source = piece.read().detach().resolve_conj().resolve_neg()
        room = self._memory[start : start + piece.bytes]
        copy = (
            room.view(piece.dtype).reshape(piece.region.sizes)
            if piece.bytes
            else torch.empty_like(source, device="cpu")
        )
        if piece.bytes:
            # The narrowest types can do little but be viewed.
            target, given = (
                (copy.view(torch.uint8), source.view(torch.uint8)) if source.element_size() == 1 else (copy, source)
            )
            target.copy_(given, non_blocking=source.is_cuda)
            if source.is_cuda:
                devices.add(source.device)

        def read() -> Tensor:
            return copy

        return replace(piece, read=read)
