"""A decoder of Mamba-2, attention and feed-forward layers (Nemotron-H, NVIDIA, 2025).

Each layer is one of them beside the residual stream, `x + mixer(norm(x))`. Attention has no positions: Mamba-2 layers
tell the order. In packed rows the state of a Mamba-2 layer, and what its convolution reads, begin anew with each
document, as attention stays inside one.

Shapes: B rows, T tokens, D hidden size.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from resilin.keys import Keys, drop, dropout, kept
from resilin.models import uncompiled
from resilin.models.attention import Attention
from resilin.models.cache import KVCache
from resilin.models.cut import BlockCut, cut_of
from resilin.models.decoder import Decoder, DecoderOutput
from resilin.models.given import Given
from resilin.models.hybrid_settings import HybridSettings
from resilin.models.mamba import Mamba2, NewTokens
from resilin.models.mask import Mask, cached_mask
from resilin.models.mlp import MLP
from resilin.models.norm import stream_norm
from resilin.models.offload import Offload, store_for
from resilin.models.recompute import run_block
from resilin.models.row_states import RowStates
from resilin.models.spans import runs_of


class HybridBlock(nn.Module):
    """`x + mixer(norm(x))`; the mixer is `mamba`, `attention` or `mlp`, and the others are not there."""

    def __init__(self, settings: HybridSettings, layer: int, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.layer, self.kind, self.dropout = layer, settings.kind_of(layer), settings.dropout
        number = settings.layers_of(self.kind).index(layer)
        own = settings.at(layer)
        self.norm = stream_norm(own, device)
        if self.kind == "mamba":
            self.mamba = Mamba2(own, number, device)
        elif self.kind == "attention":
            self.attention = Attention(own, number, device)  # its place in the cache, which others have none in
        else:
            self.mlp = MLP(own, own.feed_forward_size, device)

    def forward(
        self,
        x_BTD: Tensor,
        mask: Mask,
        runs_BT: Tensor | None,
        keys: Keys | None = None,
        cache: KVCache | None = None,
        slots_BT: Tensor | None = None,
        new: NewTokens | None = None,
        cut: BlockCut | None = None,
    ) -> Tensor:
        """The residual stream after this layer; the arguments are those of its mixer."""
        normed = self.norm(x_BTD) if cut is None else cut.norm(x_BTD, self.norm, "norm.weight")
        if self.kind == "mamba":
            mixed = self.mamba(normed, runs_BT, None if cache is None else cache.states, new, cut)
        elif self.kind == "attention":
            mixed = self.attention(normed, None, mask, cache, slots_BT, cut)
        else:
            mixed = self.mlp(normed, cut)
        return x_BTD + self._dropped(mixed, keys)

    def _dropped(self, x_BTD: Tensor, keys: Keys | None) -> Tensor:
        if keys is None or not self.dropout:
            return x_BTD
        return drop(x_BTD, self.dropout, uncompiled.outside(self._kept, x_BTD, keys))

    def _kept(self, x_BTD: Tensor, keys: Keys) -> Tensor:
        return kept(x_BTD, self.dropout, keys.fold(self.layer).fold(self.kind))


class HybridDecoder(Decoder):
    """A decoder whose layers follow a pattern. Built by `HybridSettings.build`."""

    settings: HybridSettings
    block_kind = HybridBlock
    tensor_plan = None  # type: ignore[assignment]  # not divided for tensor parallelism
    indivisible = "a hybrid decoder's blocks and rows cannot be divided over ranks"

    def row_states(self, batch: int) -> RowStates | None:
        """What its Mamba-2 layers remember of rows that have no token yet."""
        mamba, layers = self.settings.mamba, self.settings.layers_of("mamba")
        if not layers:
            return None
        device, dtype = self.embed.weight.device, self.stream_dtype
        sizes = [self.settings.at(layer).mamba for layer in layers]
        channels = max(one.width + 2 * one.state_width for one in sizes)
        heads, head_size, state = (
            max(getattr(one, name) for one in sizes) for name in ("heads", "head_size", "state_size")
        )
        wide = torch.promote_types(dtype, torch.float32)
        return RowStates(
            torch.zeros(len(layers), batch, mamba.conv_size - 1, channels, dtype=dtype, device=device),
            torch.zeros(len(layers), batch, heads, head_size, state, dtype=wide, device=device),
        )

    def _forward_all(
        self,
        tokens_BT: Tensor,
        positions_BT: Tensor | None,
        documents_BT: Tensor | None,
        keys: Keys | None,
        continues_BT: Tensor | None,
        given: Given | None = None,
    ) -> DecoderOutput:
        assert given is None  # refused by then: see `resilin.models.given.check_given`
        if continues_BT is not None:
            raise ValueError(
                "documents that go on from others (continues_BT) cannot be read by a hybrid decoder: its states are of "
                "one document; give whole texts"
            )
        (B, T), device, cut = tokens_BT.shape, tokens_BT.device, cut_of(self)
        mask = self.masks_of(documents_BT, positions_BT, None, T, device)[None]
        runs_BT = None if documents_BT is None else runs_of(documents_BT).view(B, T)
        x_BTD = self._embedded(tokens_BT, cut)
        x_BTD = dropout(x_BTD, self.settings.dropout, keys.fold("embed") if keys else None)
        store = store_for(self.settings.offload, device)
        offload = Offload(store) if store is not None else None
        for layer, block in enumerate(self.blocks):
            if cut is not None and layer in cut.skipped:
                continue
            last, before = layer == len(self.blocks) - 1, x_BTD
            own = () if cut is None else (None, None, None, cut.blocks[layer])
            x_BTD = run_block(
                self.settings.recompute,
                block,
                x_BTD,
                mask,
                runs_BT,
                keys,
                *own,
                offload=None if last else offload,
            )
            x_BTD = x_BTD if cut is None else cut.passed(layer, before, x_BTD)
        return DecoderOutput(self._last_norm(x_BTD, cut))

    def _forward_cached(
        self, tokens_BT: Tensor, positions_BT: Tensor | None, documents_BT: Tensor | None, cache: KVCache
    ) -> DecoderOutput:
        T, cut = tokens_BT.shape[1], cut_of(self)
        real_BT = None if documents_BT is None else documents_BT >= 0
        slots_BT = cache.slots_of(real_BT, T)
        reach = min(cache.reach + T, cache.capacity)
        mask = cached_mask(slots_BT, reach, cache.ragged or real_BT is not None, None)
        new = NewTokens.of(real_BT)
        x_BTD = self._embedded(tokens_BT, cut)
        for layer, block in enumerate(self.blocks):
            if cut is not None and layer in cut.skipped:
                continue
            before = x_BTD
            x_BTD = block(x_BTD, mask, None, None, cache, slots_BT, new, None if cut is None else cut.blocks[layer])
            x_BTD = x_BTD if cut is None else cut.passed(layer, before, x_BTD)
        cache.advance(real_BT, T)
        return DecoderOutput(self._last_norm(x_BTD, cut))
