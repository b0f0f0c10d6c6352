"""Softmax attention of given queries, keys and values, through one of seven ways.

Shapes: B batch, H query heads, K key heads, Q queries, S keys, D head size.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from resilin.models import one_query
from resilin.models.block_attention import block_attention, takes
from resilin.models.decoder_settings import DecoderSettings
from resilin.models.mask import LARGEST, Mask
from resilin.models.mask_rule import MaskRule
from resilin.models.span_attention import span_attention
from resilin.models.tiled_attention import tiled_attention


@cache
def _compiled_flex_attention() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)


class AttentionCore(nn.Module):
    """`softmax(cap(scale * q.k)) v`.

    A module of its own, without parameters, so that a forward hook can look at the queries and keys it receives.
    """

    def __init__(self, settings: DecoderSettings) -> None:
        super().__init__()
        self.scale = settings.attention_scale or settings.head_width**-0.5
        self.softcap = settings.attention_softcap
        self.eager = settings.attention_backend == "eager" or self.softcap is not None

    def forward(self, q_BHQD: Tensor, k_BKSD: Tensor, v_BKSD: Tensor, mask: Mask) -> Tensor:
        """Mixed values, (B, H, Q, D)."""
        if mask.block is not None:
            return self._flex(q_BHQD, k_BKSD, v_BKSD, mask)
        if mask.rule is not None:
            return tiled_attention(q_BHQD, k_BKSD, v_BKSD, self.scale, mask.rule, self.softcap)
        if mask.spans is not None:
            return span_attention(q_BHQD, k_BKSD, v_BKSD, self.scale, mask.spans)
        if self.softcap is not None and mask.causal and q_BHQD.shape[0] * q_BHQD.shape[2] ** 2 > LARGEST:
            rule = MaskRule(q_BHQD.shape[2])
            return tiled_attention(q_BHQD, k_BKSD, v_BKSD, self.scale, rule, self.softcap)
        if self.eager:
            return self._products(q_BHQD, k_BKSD, v_BKSD, mask)
        if mask.causal and takes(q_BHQD, k_BKSD):
            return block_attention(q_BHQD, k_BKSD, v_BKSD, self.scale)
        if one_query.takes(q_BHQD, mask.causal):
            return one_query.one_query(q_BHQD, k_BKSD, v_BKSD, mask.seen_BQS, self.scale)
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

    def _capped(self, logits: Tensor, *place: Tensor) -> Tensor:
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    def _flex(self, q_BHQD: Tensor, k_BKSD: Tensor, v_BKSD: Tensor, mask: Mask) -> Tensor:
        from torch.nn.attention.flex_attention import flex_attention

        # Uncompiled, flex attention is a reference implementation that holds all logits: right on a CPU, not on CUDA.
        compiled = q_BHQD.is_cuda and not torch.compiler.is_compiling()
        attend: Any = _compiled_flex_attention() if compiled else flex_attention
        mixed: Tensor = attend(
            q_BHQD.contiguous(),
            k_BKSD.contiguous(),
            v_BKSD.contiguous(),
            score_mod=None if self.softcap is None else self._capped,
            block_mask=mask.block,
            scale=self.scale,
            enable_gqa=q_BHQD.shape[1] != k_BKSD.shape[1],
        )
        return mixed

    def _products(self, q_BHQD: Tensor, k_BKSD: Tensor, v_BKSD: Tensor, mask: Mask) -> Tensor:
        group = q_BHQD.shape[1] // k_BKSD.shape[1]
        k_BHSD, v_BHSD = (x.repeat_interleave(group, dim=1) if group > 1 else x for x in (k_BKSD, v_BKSD))
        logits_BHQS = q_BHQD * self.scale @ k_BHSD.transpose(-1, -2)
        logits_BHQS = self._capped(logits_BHQS.to(torch.promote_types(logits_BHQS.dtype, torch.float32)))
        if mask.causal:
            size = logits_BHQS.shape[-1]
            hidden = torch.ones(size, size, dtype=torch.bool, device=logits_BHQS.device).triu(1)
            logits_BHQS = logits_BHQS.masked_fill(hidden, -torch.inf)
        elif mask.seen_BQS is not None:
            logits_BHQS = logits_BHQS.masked_fill(~mask.seen_BQS[:, None], -torch.inf)
        return logits_BHQS.softmax(-1).to(v_BHSD.dtype) @ v_BHSD
