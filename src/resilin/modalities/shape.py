"""The shape of a picture as groups: one grid of tokens for each scale, from coarse to fine."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class PictureShape:
    """Grids of tokens.

    Attributes:
        scales: (height, width) of each scale; the last is the finest, and may come several times.
        seen_whole: whether a further group of the finest grid follows, which holds the whole picture and predicts
            nothing: what comes after the picture then sees its last scale too.
    """

    scales: tuple[tuple[int, int], ...]
    seen_whole: bool = False

    @property
    def finest(self) -> tuple[int, int]:
        """Height and width of the last scale."""
        return self.scales[-1]

    @property
    def grids(self) -> tuple[tuple[int, int], ...]:
        """The grids of all groups."""
        return (*self.scales, self.finest) if self.seen_whole else self.scales

    @property
    def predicted(self) -> int:
        """Tokens that are predicted."""
        return sum(height * width for height, width in self.scales)

    @property
    def places(self) -> int:
        """Positions in a row."""
        return sum(height * width for height, width in self.grids)

    @cached_property
    def group_of_place(self) -> Tensor:
        """(places,) int64: the number of each position's group."""
        sizes = torch.tensor([height * width for height, width in self.grids])
        return torch.repeat_interleave(torch.arange(len(sizes)), sizes)
