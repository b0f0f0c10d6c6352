"""Grouped-query attention with rotary positions.

Shapes: B batch, T tokens, H query heads, K key heads, D head size, S keys seen, Q queries.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from resilin.models.attention_core import AttentionCore
from resilin.models.cache import KVCache
from resilin.models.chain_keys import by_chain, by_key_head
from resilin.models.chain_linear import linear_of
from resilin.models.chain_settings import reach_of
from resilin.models.cut import BlockCut
from resilin.models.decoder_settings import DecoderSettings
from resilin.models.mask import Mask
from resilin.models.norm import head_norm
from resilin.models.rope import Rotation, rotate


class Attention(nn.Module):
    """Projections, optional head norms, rotation, the core, and the output projection."""

    def __init__(self, settings: DecoderSettings, layer: int, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.layer = layer
        self.heads, self.key_heads, self.head_size = settings.heads, settings.key_heads, settings.head_width
        bias, chained, (hidden, queries, keys, _) = settings.qkv_bias, settings.chains is not None, settings.widths
        self.chains = settings.chains.sizes if settings.chains is not None else ()
        self.key_width = hidden[0] if settings.shares_keys else None
        """CoLM-Air: keys and values read so much of the stream, the first chain; None: all of it."""
        read = hidden if self.key_width is None else hidden[:1]
        self.q = linear_of(chained, hidden, queries, bias, device)
        self.k = linear_of(chained and self.key_width is None, read, keys, bias, device)
        self.v = linear_of(chained and self.key_width is None, read, keys, bias, device)
        self.o = linear_of(chained, queries, hidden, settings.out_bias, device)
        key_chains = tuple(width // self.head_size for width in keys) if chained and self.key_width is None else ()
        self.q_norm = head_norm(settings, self.heads, device, self.chains)
        self.k_norm = head_norm(settings, self.key_heads, device, key_chains)
        self.norm_over_width = settings.qk_norm_over == "width"
        self.core: nn.Module = AttentionCore(settings)

    def _heads(self, x_BTW: Tensor, norm: Callable[[Tensor], Tensor] | None) -> Tensor:
        """(B, T, H * D) -> (B, T, H, D), normed over each head or over all of them."""
        if norm is not None and self.norm_over_width:
            x_BTW = norm(x_BTW)
        x_BTHD = x_BTW.view(*x_BTW.shape[:2], x_BTW.shape[-1] // self.head_size, self.head_size)
        if norm is not None and not self.norm_over_width:
            x_BTHD = norm(x_BTHD)
        return x_BTHD

    def _projected(self, x_BTD: Tensor, cut: BlockCut | None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values before their rotation: (B, T, H, D), (B, T, K, D) twice."""
        B, T, _ = x_BTD.shape
        if cut is None:
            read_BTD = x_BTD if self.key_width is None else x_BTD[..., : self.key_width]
            q_BTHD = self._heads(self.q(x_BTD), self.q_norm)
            k_BTKD = self._heads(self.k(read_BTD), self.k_norm)
            return q_BTHD, k_BTKD, self.v(read_BTD).view(k_BTKD.shape)
        q_BTW, k_BTW, v_BTW = (
            cut.linear(x_BTD, one, f"attention.{name}") for name, one in (("q", self.q), ("k", self.k), ("v", self.v))
        )
        norms = [
            None if norm is None else partial(cut.norm, norm=norm, name=name, used=heads * self.head_size)
            for (norm, name), heads in zip(self._norms(), (cut.heads, cut.key_heads), strict=True)
        ]
        q_BTHD, k_BTKD = (self._heads(x, norm) for x, norm in zip((q_BTW, k_BTW), norms, strict=True))
        return q_BTHD, k_BTKD, v_BTW.view(B, T, v_BTW.shape[-1] // self.head_size, self.head_size)

    def _chains_of(self, heads: int) -> tuple[int, ...]:
        """Query heads of each of the chains that have so many together."""
        return self.chains[: reach_of(self.chains).index(heads) + 1]

    def _norms(self) -> tuple[tuple[nn.Module | None, str], ...]:
        return (self.q_norm, "attention.q_norm.weight"), (self.k_norm, "attention.k_norm.weight")

    def forward(
        self,
        x_BTD: Tensor,
        turn: Rotation | None,
        mask: Mask,
        cache: KVCache | None = None,
        slots_BT: Tensor | None = None,
        cut: BlockCut | None = None,
    ) -> Tensor:
        """(B, T, hidden) -> (B, T, hidden); with a cache, new keys and values are stored at `slots_BT` first.

        Of a cut block the used heads alone are computed, stored and read. Without `turn` there are no positions.
        """
        B, T, _ = x_BTD.shape
        q_BTHD, k_BTKD, v_BTKD = self._projected(x_BTD, cut)
        chains = self._chains_of(q_BTHD.shape[2]) if self.key_width is not None else ()
        if chains:
            q_BTHD = by_key_head(q_BTHD, chains, self.key_heads)
        if turn is not None:
            q_BTHD, k_BTKD = rotate(q_BTHD, turn), rotate(k_BTKD, turn)
        if cache is None:
            k_BKSD, v_BKSD = k_BTKD.transpose(1, 2), v_BTKD.transpose(1, 2)
        else:
            assert slots_BT is not None
            cache.store(self.layer, slots_BT, k_BTKD, v_BTKD)
            held = cache.read(self.layer, min(cache.reach + T, cache.capacity), k_BTKD.shape[2])
            k_BKSD, v_BKSD = (x.to(q_BTHD.dtype) for x in held)
        if q_BTHD.shape[2]:
            mixed_BTHD = self.core(q_BTHD.transpose(1, 2), k_BKSD, v_BKSD, mask).transpose(1, 2)
        else:  # a rank of tensor parallelism without any head of a cut block: its gradients are zero
            mixed_BTHD = torch.cat([q_BTHD, k_BTKD[:, :, :0], v_BTKD[:, :, :0]], 2)
        if chains:
            mixed_BTHD = by_chain(mixed_BTHD, chains, self.key_heads)
        mixed_BTW = mixed_BTHD.reshape(B, T, -1)
        out_BTD: Tensor = self.o(mixed_BTW) if cut is None else cut.linear(mixed_BTW, self.o, "attention.o")
        return out_BTD
