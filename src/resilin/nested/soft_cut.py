"""Running a decoder with masks in place of slices: all of it is computed, and what is left out is multiplied by 0.

A mask may be anything in between, and a gradient flows to it: so a router learns which sizes to choose. With masks of
zeros and ones the model computes what the sub-model that is cut out computes: norms divide by how much of their width
is there (the sum of the mask), not by all of it.

Shapes: B rows, T tokens, D hidden size, I inputs of a map, L layers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from resilin.models.chain_linear import ChainLinear
from resilin.models.cut import BlockCut, Cut
from resilin.models.norm import LayerNorm

_BACK = ("attention.o", "mlp.down", "mamba.out")


def masked_norm(x: Tensor, norm: nn.Module, mask_D: Tensor) -> Tensor:
    """A norm of what is there of its width.

    Args:
        x: (..., D), already masked.
        norm: RMS or layer norm.
        mask_D: how much of each value is there.
    """
    weight: Any = norm.weight
    weight_D: Tensor = weight.to(x.dtype)
    eps: float = norm.eps  # type: ignore[assignment]
    count = mask_D.sum()
    if isinstance(norm, LayerNorm):
        gap = (x - x.sum(-1, keepdim=True) / count) * mask_D
        variance = (gap * gap).sum(-1, keepdim=True) / count
        return weight_D * gap * (variance + eps).rsqrt()
    mean = (x * x).sum(-1, keepdim=True) / count
    return weight_D * x * (mean + eps).rsqrt()


@dataclass(frozen=True, eq=False)
class MaskedBlock(BlockCut):
    """A block all of which is computed.

    Attributes:
        stream_D: how much of each value of the stream is there; None: all.
        inside: the same by name: inputs of `attention.o` and `mlp.down`, `mamba.scanned`, and what norms inside the
            block are taken over.
    """

    stream_D: Tensor | None = None
    inside: Mapping[str, Tensor] = field(default_factory=dict)

    def linear(self, x: Tensor, map_: nn.Linear | ChainLinear, name: str) -> Tensor:
        """What the map gives of what is there of its input, as far as its output is there."""
        mask_I = self.inside.get(name)
        y: Tensor = map_(x if mask_I is None else x * mask_I.to(x.dtype))
        if name in _BACK and self.stream_D is not None:
            y = y * self.stream_D.to(y.dtype)
        return y

    def norm(self, x: Tensor, norm: nn.Module, name: str, used: int = 0) -> Tensor:
        """The norm of what is there."""
        mask = self.inside.get(name)
        if mask is not None:  # of queries or keys, over all heads
            return masked_norm(x * mask.to(x.dtype), norm, mask.to(x.dtype))
        if self.stream_D is None or not name.startswith(("attention_norm", "mlp_norm", "norm")):
            whole: Tensor = norm(x)
            return whole
        return masked_norm(x, norm, self.stream_D.to(x.dtype))

    def masked(self, x: Tensor, name: str) -> Tensor:
        """An activation as far as it is there."""
        mask = self.inside.get(name)
        return x if mask is None else x * mask.to(x.dtype)

    def share(self, name: str) -> Tensor | None:
        """Which share of each group of a norm is there."""
        mask_GI = self.inside.get(name)
        return None if mask_GI is None else mask_GI.mean(-1, keepdim=True)


@dataclass(frozen=True, eq=False)
class MaskedCut(Cut):
    """A decoder all of which is computed.

    Attributes:
        stream_D: as of `MaskedBlock`.
        kept_L: how much of each layer's branch is added to the stream; None: all.
    """

    stream_D: Tensor | None = None
    kept_L: Tensor | None = None

    def embedded(self, x_BTD: Tensor) -> Tensor:
        """The stream before the first block."""
        return x_BTD if self.stream_D is None else x_BTD * self.stream_D.to(x_BTD.dtype)

    def passed(self, layer: int, before_BTD: Tensor, after_BTD: Tensor) -> Tensor:
        """The stream after a block."""
        if self.kept_L is None:
            return after_BTD
        return torch.lerp(before_BTD, after_BTD, self.kept_L[layer].to(after_BTD.dtype))

    def last_norm(self, x_BTD: Tensor, norm: nn.Module) -> Tensor | None:
        """The stream after the last norm."""
        return None if self.stream_D is None else masked_norm(x_BTD, norm, self.stream_D.to(x_BTD.dtype))
