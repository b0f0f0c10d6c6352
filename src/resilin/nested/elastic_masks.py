"""The masks of every choice, and the mixture of them that probabilities make.

Shapes: J choices of an axis, R rows of choices, L layers, D hidden size, W width of a mask.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from resilin.layout import Region
from resilin.models.decoder_settings import DecoderSettings
from resilin.models.hybrid_settings import HybridSettings
from resilin.nested.elastic_space import Axis, ElasticSpace, budget_at, hidden_of, layers_kept
from resilin.nested.regions import regions
from resilin.nested.soft_cut import MaskedBlock, MaskedCut


def _indicator(boxes: tuple[Region, ...], dim: int, size: int) -> Tensor:
    mask = torch.zeros(size)
    for box in boxes:
        mask[box.offsets[dim] : box.offsets[dim] + box.sizes[dim]] = 1
    return mask


@dataclass(frozen=True)
class MaskTable:
    """The masks of all choices.

    Attributes:
        hidden_JD: of the stream.
        kept_JL: of layers.
        inside: by (axis, layer), then by the name in the block, (J, W).
    """

    hidden_JD: Tensor
    kept_JL: Tensor
    inside: Mapping[tuple[str, int], Mapping[str, Tensor]]

    @staticmethod
    def of(settings: DecoderSettings, space: ElasticSpace, axes: Sequence[Axis], order: Sequence[int]) -> MaskTable:
        """Of a model; `order` has its layers, the most important first."""
        hidden_JD = torch.zeros(len(space.hidden), settings.hidden_size)
        for choice in range(len(space.hidden)):
            hidden_JD[choice, : hidden_of(settings, space, choice)] = 1
        kept_JL = torch.zeros(len(space.depth), settings.layers)
        for choice in range(len(space.depth)):
            kept_JL[choice, list(order[: layers_kept(settings, space, choice)])] = 1
        inside: dict[tuple[str, int], dict[str, Tensor]] = {}
        for axis in axes:
            for layer in axis.layers:
                found: dict[str, list[Tensor]] = {}
                for choice in range(axis.choices):
                    used = regions(settings, budget_at(settings, axis, space, layer, choice))
                    for name, mask in _masks_of(settings, axis.name, layer, used).items():
                        found.setdefault(name, []).append(mask)
                inside[axis.name, layer] = {name: torch.stack(masks) for name, masks in found.items()}
        return MaskTable(hidden_JD, kept_JL, inside)

    def cut(self, settings: DecoderSettings, axes: Sequence[Axis], shares: Mapping[str, Tensor]) -> MaskedCut:
        """The masks of some probabilities: the sum of each choice's mask, weighted.

        Args:
            settings: of the model.
            axes: of the model.
            shares: by axis, (R, J).
        """
        stream_D = shares["hidden"][0] @ self.hidden_JD.to(shares["hidden"]) if "hidden" in shares else None
        kept_L = self.kept(shares)
        blocks = []
        for layer in range(settings.layers):
            inside: dict[str, Tensor] = {}
            for axis in axes:
                if layer in axis.layers:
                    chosen_J = shares[axis.name][axis.row_of(layer)]
                    for name, masks_JW in self.inside[axis.name, layer].items():
                        inside[name] = torch.tensordot(chosen_J, masks_JW.to(chosen_J), 1)
            own = settings.at(layer)
            blocks.append(MaskedBlock({}, own.hidden_size, own.heads, own.key_heads, stream_D=stream_D, inside=inside))
        return MaskedCut(settings.hidden_size, tuple(blocks), stream_D=stream_D, kept_L=kept_L)

    def kept(self, shares: Mapping[str, Tensor]) -> Tensor | None:
        """(L,) how much of each layer is kept; None: all."""
        depth = shares.get("depth")
        return None if depth is None else depth[0] @ self.kept_JL.to(depth)


def _masks_of(
    settings: DecoderSettings, axis: str, layer: int, used: Mapping[str, tuple[Region, ...]]
) -> dict[str, Tensor]:
    """The masks in a block that a choice comes to, read from the regions that it uses."""
    own, prefix = settings.at(layer), f"blocks.{layer}."
    if axis == "ffn":
        return {"mlp.down": _indicator(used[f"{prefix}mlp.down.weight"], 1, own.feed_forward_size)}
    if axis == "heads":
        queries, keys = own.heads * own.head_width, own.key_heads * own.head_width
        found = {"attention.o": _indicator(used[f"{prefix}attention.o.weight"], 1, queries)}
        if own.qk_norm in ("rms", "layer") and own.qk_norm_over == "width":
            found["attention.q_norm.weight"] = _indicator(used[f"{prefix}attention.q.weight"], 0, queries)
            found["attention.k_norm.weight"] = _indicator(used[f"{prefix}attention.k.weight"], 0, keys)
        return found
    assert isinstance(own, HybridSettings)
    channels = _indicator(used[f"{prefix}mamba.out.weight"], 1, own.mamba.width)
    return {"mamba.scanned": channels, "mamba.norm.weight": channels.view(own.mamba.groups, -1)}
