"""A Source transform: pairs of answers that can be shown short, so that a schedule of shapes can train on them.

Shapes: B pairs, T positions of a row, F positions of a shape.
"""

from __future__ import annotations

import copy
from typing import Annotated, Any

import torch

from resilin.config import component
from resilin.data.settings import SourceContext, SourceSettings
from resilin.nouns import Batch, Source
from resilin.transforms import SourceTransform
from resilin.vision.grid import Grid

SIDES = ("chosen", "rejected")


class PairGrid(SourceSettings):
    """Pairs of a preference source, with the beginning of the prompt cut off in short shapes."""

    length: int = 64
    """Positions of the whole shape."""
    source: Annotated[SourceSettings, component("resilin.data.preference_source:PreferenceSource")]
    """The pairs."""

    def build(self, context: SourceContext) -> Source:
        """The pairs of one split; held-out pairs are always whole."""
        inner = self.source.build(context)
        return inner if context.split == "validation" else PairGridSource(inner, Grid(frames=self.length))


class PairGridSource(SourceTransform):
    """What a schedule of shapes asks of a source: `grid`, `resampled(grid)` and the samples of an epoch."""

    def __init__(self, inner: Any, grid: Grid) -> None:
        super().__init__(inner)
        self.grid = grid

    @property
    def epoch_length(self) -> int:
        """Pairs of one pass."""
        order: Any = self.order  # the pairs' own
        rows: int = order.epoch_length
        return rows

    def resampled(self, grid: Grid) -> PairGridSource:
        """The same pairs in another shape."""
        other = copy.copy(self)
        other.grid = grid
        return other

    def shown(self, step: int | None, batch: Batch) -> Batch:
        """The last `grid.frames` positions up to the end of each answer."""
        fields = dict(batch.fields)
        for side in SIDES:
            labels_BT = fields[f"{side}_labels"]
            T, size = labels_BT.shape[1], min(self.grid.frames, labels_BT.shape[1])
            end_B = ((labels_BT != -100) * torch.arange(1, T + 1)).amax(1)
            places_BF = (end_B - size).clamp(min=0)[:, None] + torch.arange(size)
            for name in (f"{side}_tokens", f"{side}_labels"):
                fields[name] = fields[name].gather(1, places_BF)
        return Batch(batch.slots_B, fields)
