"""Grouped-query attention with rotary positions.

Shapes: B batch, T tokens, H query heads, K key heads, D head size, S keys seen, Q queries.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from resilin.models.attention_core import AttentionCore
from resilin.models.cache import KVCache
from resilin.models.decoder_settings import DecoderSettings
from resilin.models.linear import Linear
from resilin.models.mask import Mask
from resilin.models.norm import head_norm
from resilin.models.rope import Rotation, rotate


class Attention(nn.Module):
    """Projections, optional head norms, rotation, the core, and the output projection."""

    def __init__(self, settings: DecoderSettings, layer: int, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.layer = layer
        self.heads, self.key_heads, self.head_size = settings.heads, settings.key_heads, settings.head_width
        width, bias = settings.hidden_size, settings.qkv_bias
        self.q = Linear(width, self.heads * self.head_size, bias=bias, device=device)
        self.k = Linear(width, self.key_heads * self.head_size, bias=bias, device=device)
        self.v = Linear(width, self.key_heads * self.head_size, bias=bias, device=device)
        self.o = Linear(self.heads * self.head_size, width, bias=settings.out_bias, device=device)
        self.q_norm = head_norm(settings, self.heads, device)
        self.k_norm = head_norm(settings, self.key_heads, device)
        self.norm_over_width = settings.qk_norm_over == "width"
        self.core: nn.Module = AttentionCore(settings)

    def _heads(self, x_BTW: Tensor, count: int, norm: nn.Module | None) -> Tensor:
        """(B, T, count * D) -> (B, T, count, D), normed over each head or over all of them."""
        if norm is not None and self.norm_over_width:
            x_BTW = norm(x_BTW)
        x_BTHD = x_BTW.view(*x_BTW.shape[:2], count, self.head_size)
        if norm is not None and not self.norm_over_width:
            x_BTHD = norm(x_BTHD)
        return x_BTHD

    def forward(
        self, x_BTD: Tensor, turn: Rotation, mask: Mask, cache: KVCache | None = None, slots_BT: Tensor | None = None
    ) -> Tensor:
        """(B, T, hidden) -> (B, T, hidden); with a cache, new keys and values are stored at `slots_BT` first."""
        B, T, _ = x_BTD.shape
        q_BTHD = self._heads(self.q(x_BTD), self.heads, self.q_norm)
        k_BTKD = self._heads(self.k(x_BTD), self.key_heads, self.k_norm)
        v_BTKD = self.v(x_BTD).view(B, T, self.key_heads, self.head_size)
        q_BTHD, k_BTKD = rotate(q_BTHD, turn), rotate(k_BTKD, turn)
        if cache is None:
            k_BKSD, v_BKSD = k_BTKD.transpose(1, 2), v_BTKD.transpose(1, 2)
        else:
            assert slots_BT is not None
            cache.store(self.layer, slots_BT, k_BTKD, v_BTKD)
            k_BKSD, v_BKSD = (x.to(q_BTHD.dtype) for x in cache.read(self.layer, min(cache.reach + T, cache.capacity)))
        mixed_BHTD = self.core(q_BTHD.transpose(1, 2), k_BKSD, v_BKSD, mask)
        out_BTD: Tensor = self.o(mixed_BHTD.transpose(1, 2).reshape(B, T, self.heads * self.head_size))
        return out_BTD
