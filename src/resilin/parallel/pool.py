"""Buffers for what is sent and received, step after step."""

from __future__ import annotations

from torch import Tensor


class Pool:
    """Memory used again and again, as getting it anew costs as much as filling it.

    Args:
        like: of whose format.
        pieces: how many may be in use at one time.
    """

    def __init__(self, like: Tensor, pieces: int) -> None:
        self._pieces = [like.new_empty(0) for _ in range(pieces)]

    def take(self, size: int) -> Tensor:
        """The piece that was taken longest ago, of so many elements."""
        piece = self._pieces.pop(0)
        if piece.numel() < size:
            piece = piece.new_empty(size)
        self._pieces.append(piece)
        return piece[:size]
