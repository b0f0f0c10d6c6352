"""Rows of tokens cut into shorter ones: the grid of language.

Legend: B slots, L tokens of a row, l tokens of a piece.
"""

from __future__ import annotations

import copy
from typing import Any

import torch

from resilin.keys import Keys
from resilin.nouns import Batch
from resilin.transforms import SourceTransform
from resilin.vision.grid import Grid


class Pieces(SourceTransform):
    """A window of each row: tokens next to each other, as a coarser sampling of text would be another language.

    The window's place is drawn by key, so that all parts of a row are seen over the epochs. Every field whose second
    axis is as long as the row is cut; `positions` and `documents` begin anew with the window.

    Attributes:
        grid: `frames` is the length of the window.
    """

    def __init__(self, inner: Any) -> None:
        super().__init__(inner)
        self.order: Any = getattr(inner, "order", None)
        self.length: int = inner.sequence_length
        self.grid = Grid(frames=self.length)

    @property
    def sequence_length(self) -> int:
        """Tokens of the default shape."""
        return self.length

    @property
    def epoch_length(self) -> int:
        """Rows of one pass."""
        own: int | None = getattr(self.inner, "epoch_length", None)
        rows: int = self.order.epoch_length if own is None else own
        return rows

    def resampled(self, grid: Grid) -> Pieces:
        """The same rows, in windows of `grid.frames` tokens."""
        if grid == self.grid:
            return self
        other = copy.copy(self)
        other.grid = grid
        return other

    def shown(self, step: int | None, batch: Batch) -> Batch:
        """The windows of these rows; outside any step the rows."""
        size = self.grid.frames
        if size == self.length or step is None:
            return batch
        seed = getattr(self.order, "seed", 0)
        u_B = Keys(seed, step, batch.slots_B).fold("window").uniform((1,))[:, 0]
        starts_B = (u_B * (self.length - size + 1)).long().clamp(max=self.length - size)
        places_BT = starts_B[:, None] + torch.arange(size)
        fields = {}
        for name, values in batch.fields.items():
            if values.ndim >= 2 and values.shape[1] == self.length:
                wide = places_BT.view(*places_BT.shape, *[1] * (values.ndim - 2))
                values = values.gather(1, wide.expand(-1, -1, *values.shape[2:]))
            fields[name] = values
        if "documents" in fields:
            real = fields["documents"] >= 0
            first = fields["documents"][:, :1].clamp(min=0)
            fields["documents"] = torch.where(real, fields["documents"] - first, fields["documents"])
        if "positions" in fields:
            fields["positions"] = _restart(fields["positions"])
        return Batch(batch.slots_B, fields)


def _restart(positions_BT: torch.Tensor) -> torch.Tensor:
    """Positions of the text that a window cuts into begin at 0; those of later texts stay."""
    began_BT = (positions_BT == 0).cumsum(1) > 0
    return torch.where(began_BT, positions_BT, positions_BT - positions_BT[:, :1])
