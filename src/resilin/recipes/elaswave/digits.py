"""The handwritten digits that scikit-learn comes with (8 x 8 pixels, 1,797 of them), and a small network for them."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Annotated

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from resilin.data.settings import SourceContext
from resilin.keys import Keys, dropout
from resilin.models.settings import ModelContext, ModelSettings
from resilin.vision.digits import digit_pixels, digits_file
from resilin.vision.grid import Grid
from resilin.vision.labelled import LabelledSettings, LabelledSource

SIDE = 8
PIXEL = 16.0
"""The largest value of a pixel."""


class DigitSamples:
    """The images, as `resilin.vision.labelled` reads them."""

    def __init__(self) -> None:
        pixels_NHW, self.labels_N = digit_pixels()
        self.classes = tuple(map(str, range(10)))
        self.digest = hashlib.sha256(digits_file().read_bytes()).hexdigest()
        self._pixels_N = torch.from_numpy(pixels_NHW.astype(np.float32) / PIXEL).reshape(-1, 1, SIDE, SIDE)

    fixed_views = 1

    def view(self, index: int, grid: Grid, full: Grid, u: list[float] | None, number: int | None = None) -> Tensor:
        """(1, 8, 8) in [0, 1]."""
        return self._pixels_N[index]

    def batch(self, views: Sequence[Tensor]) -> Tensor:
        """(B, 1, 8, 8)."""
        return torch.stack(tuple(views))


class Digits(LabelledSettings):
    """scikit-learn's digits."""

    augment: bool = False

    def build(self, context: SourceContext) -> LabelledSource:
        """The source of one split."""
        return self.source(DigitSamples(), Grid(size=SIDE), context)


class DigitNetworkSettings(ModelSettings):
    """Fully connected layers with dropout between them."""

    widths: tuple[Annotated[int, Field(gt=0)], ...] = (SIDE * SIDE, 64, 64, 10)
    """Of the input, the hidden layers and the output."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.2
    """Of every hidden layer."""

    def build(self, context: ModelContext) -> DigitNetwork:
        """The network with its initial weights."""
        return DigitNetwork(self, context.seed)


class DigitNetwork(nn.Module):
    """See `DigitNetworkSettings`; random numbers of dropout are the slots' own."""

    def __init__(self, settings: DigitNetworkSettings, seed: int) -> None:
        super().__init__()
        self.dropout = settings.dropout
        widths = settings.widths
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(widths))
        inputs = {f"layers.{number}": width for number, width in enumerate(widths)}
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                bound = 1 / math.sqrt(inputs[name.rpartition(".")[0]])  # as torch does by itself
                parameter.uniform_(-bound, bound, generator=Keys.of_step(seed, 0).fold(name).generator())

    def forward(self, inputs: Tensor, keys: Keys | None = None) -> Tensor:
        """(B, 1, 8, 8) -> logits (B, 10)."""
        x_BC = inputs.flatten(1)
        *hidden, last = self.layers
        for number, layer in enumerate(hidden):
            x_BC = dropout(torch.relu(layer(x_BC)), self.dropout, keys.fold(number) if keys is not None else None)
        logits: Tensor = last(x_BC)
        return logits
