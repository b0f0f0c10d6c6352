"""The arithmetic of tensor parallelism in one process: products that are added up rank by rank."""

from __future__ import annotations

from typing import Annotated, Self

import torch
import torch.nn.functional as F
from pydantic import model_validator
from torch import Tensor, nn

from resilin.config import SettingsError, component
from resilin.models.decoder import Decoder
from resilin.models.linear import Linear
from resilin.models.settings import ModelContext, ModelSettings
from resilin.nouns import StepView


class PartialSums(ModelSettings):
    """A decoder whose row-parallel products (attention's output, the feed-forward's) are sums over ranks."""

    model: Annotated[ModelSettings, component("resilin.models.decoder_settings:DecoderSettings")]
    """The decoder."""
    ways: tuple[tuple[int, int], ...] = ((0, 1),)
    """(first step, ranks of tensor parallelism), ascending from step 0."""

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        starts = [start for start, _ in self.ways]
        if not starts or starts[0] != 0 or starts != sorted(set(starts)) or any(ways < 1 for _, ways in self.ways):
            raise ValueError(f"ways are (first step, at least one rank), ascending from step 0, not {self.ways}")
        return self

    def build(self, context: ModelContext) -> nn.Module:
        """The decoder; its parameters and their names stay."""
        model = self.model.build(context)
        decoder = next((module for module in model.modules() if isinstance(module, Decoder)), None)
        if decoder is None:
            raise SettingsError(f"PartialSums is about a Decoder, not a {type(model).__name__}")
        for owner in list(decoder.modules()):
            for name, linear in list(owner.named_children()):
                if name in ("o", "down") and isinstance(linear, nn.Linear):
                    setattr(owner, name, RowParallel(linear, self.ways))
        return model


class RowParallel(Linear):
    """x W^T as the sum of each rank's columns of x and W, in the order of ranks."""

    def __init__(self, whole: nn.Linear, ways: tuple[tuple[int, int], ...]) -> None:
        super().__init__(whole.in_features, whole.out_features, bias=whole.bias is not None, device="meta")
        self.weight, self.bias = whole.weight, whole.bias
        self.ways, self.now = ways, ways[0][1]

    def before_step(self, view: StepView) -> None:
        """As many ranks as there are in this step."""
        self.now = next(ways for start, ways in reversed(self.ways) if start <= view.step)

    def forward(self, x: Tensor) -> Tensor:
        """(..., I) -> (..., O)."""
        if self.now == 1:
            return super().forward(x)
        parts = zip(x.chunk(self.now, dim=-1), self.weight.chunk(self.now, dim=1), strict=True)
        total: Tensor | None = None
        for inputs, columns in parts:
            product = F.linear(inputs, columns)
            total = product if total is None else total + product
        assert isinstance(total, torch.Tensor)
        return total if self.bias is None else total + self.bias
