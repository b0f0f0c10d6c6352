"""What a joined model is put together from: shared parameters, feed-forwards by expert, rows and offsets.

Shapes: E experts, L layers, D hidden size.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from resilin.joined.expert import Expert
from resilin.models.decoder_settings import DecoderSettings

_FEED_FORWARD = re.compile(r"blocks\.(\d+)\.(?:mlp\.(gate|up|down)\.weight|moe\.experts\.(gate|up|down))")
_ROUTER = re.compile(r"blocks\.(\d+)\.moe\.router\.(weight|bias)")

FeedForward = Callable[[int, str], Tensor]
"""(layer, "gate" | "up" | "down") -> one matrix of one expert."""


@dataclass(frozen=True, slots=True)
class Parts:
    """Everything of a joined model; nothing is read until it is asked for.

    Attributes:
        settings: of the model.
        shared: gives a parameter that all experts share, by name.
        experts: the feed-forwards, in the order of the router's rows.
        rows_ELD: of the router.
        offsets_EL: on the router's logits; None: there are none.
    """

    settings: DecoderSettings
    shared: Callable[[str], Tensor]
    experts: Sequence[FeedForward]
    rows_ELD: Tensor
    offsets_EL: Tensor | None

    def parameter(self, name: str, expert: int | None = None) -> Tensor:
        """A parameter of the model, or the matrix of one expert where it is a stack of them.

        Args:
            name: of the parameter.
            expert: which matrix; None: all of the parameter.
        """
        match = _FEED_FORWARD.fullmatch(name)
        if match is not None:
            layer, matrix = int(match[1]), match[2] or match[3]
            if match[2] is not None:  # one expert alone is a dense model
                return self.experts[0](layer, matrix)
            if expert is not None:
                return self.experts[expert](layer, matrix)
            return torch.stack([one(layer, matrix) for one in self.experts])
        match = _ROUTER.fullmatch(name)
        if match is None:
            return self.shared(name)
        layer = int(match[1])
        if match[2] == "weight":
            return self.rows_ELD[:, layer]
        assert self.offsets_EL is not None
        return self.offsets_EL[:, layer]


def feed_forward_of(expert: Expert) -> FeedForward:
    """The matrices of an expert that was handed over."""
    return lambda layer, matrix: expert.tensors[f"layers.{layer}.{matrix}"]


def offsets_of(expert: Expert) -> Tensor:
    """(L,): what is added to its logits: never above 0 (a positive offset counts as none); 0 where it has none."""
    if not expert.offsets:
        return torch.zeros(expert.layers)
    offsets = [expert.tensors[f"layers.{layer}.offset"] for layer in range(expert.layers)]
    return torch.stack(offsets).float().clamp(max=0)
