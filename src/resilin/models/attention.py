"""Grouped-query attention with rotary positions.

Shapes: B batch, T tokens, H query heads, K key heads, D head size, S keys seen, Q queries.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from resilin.models.cache import KVCache
from resilin.models.decoder_settings import DecoderSettings
from resilin.models.linear import Linear
from resilin.models.mask import Mask
from resilin.models.norm import head_norm
from resilin.models.rope import Rotation, rotate


class AttentionCore(nn.Module):
    """Softmax attention of given queries, keys and values.

    A module of its own, without parameters, so that a forward hook can look at the queries and keys it receives.
    """

    def __init__(self, settings: DecoderSettings) -> None:
        super().__init__()
        self.backend = settings.attention_backend
        self.scale = settings.attention_scale or settings.head_width**-0.5
        self.softcap = settings.attention_softcap

    def forward(self, q_BHQD: Tensor, k_BKSD: Tensor, v_BKSD: Tensor, mask: Mask) -> Tensor:
        """Mixed values, (B, H, Q, D)."""
        if self.backend == "sdpa":
            seen = None if mask.seen_BQS is None else mask.seen_BQS[:, None]
            return F.scaled_dot_product_attention(
                q_BHQD,
                k_BKSD,
                v_BKSD,
                attn_mask=seen,
                is_causal=mask.causal,
                scale=self.scale,
                enable_gqa=q_BHQD.shape[1] != k_BKSD.shape[1],
            )
        return self._eager(q_BHQD, k_BKSD, v_BKSD, mask)

    def _eager(self, q_BHQD: Tensor, k_BKSD: Tensor, v_BKSD: Tensor, mask: Mask) -> Tensor:
        group = q_BHQD.shape[1] // k_BKSD.shape[1]
        k_BHSD, v_BHSD = (x.repeat_interleave(group, dim=1) if group > 1 else x for x in (k_BKSD, v_BKSD))
        logits_BHQS = (q_BHQD * self.scale @ k_BHSD.transpose(-1, -2)).float()
        if self.softcap is not None:
            logits_BHQS = self.softcap * torch.tanh(logits_BHQS / self.softcap)
        if mask.causal:
            size = logits_BHQS.shape[-1]
            hidden = torch.ones(size, size, dtype=torch.bool, device=logits_BHQS.device).triu(1)
            logits_BHQS = logits_BHQS.masked_fill(hidden, -torch.inf)
        elif mask.seen_BQS is not None:
            logits_BHQS = logits_BHQS.masked_fill(~mask.seen_BQS[:, None], -torch.inf)
        return logits_BHQS.softmax(-1).to(v_BHSD.dtype) @ v_BHSD


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
        self.q_norm = head_norm(settings, device)
        self.k_norm = head_norm(settings, device)
        self.core = AttentionCore(settings)

    def forward(
        self, x_BTD: Tensor, turn: Rotation, mask: Mask, cache: KVCache | None = None, slots_BT: Tensor | None = None
    ) -> Tensor:
        """(B, T, hidden) -> (B, T, hidden); with a cache, new keys and values are stored at `slots_BT` first."""
        B, T, _ = x_BTD.shape
        q_BTHD = self.q(x_BTD).view(B, T, self.heads, self.head_size)
        k_BTKD = self.k(x_BTD).view(B, T, self.key_heads, self.head_size)
        v_BTKD = self.v(x_BTD).view(B, T, self.key_heads, self.head_size)
        if self.q_norm is not None and self.k_norm is not None:
            q_BTHD, k_BTKD = self.q_norm(q_BTHD), self.k_norm(k_BTKD)
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
