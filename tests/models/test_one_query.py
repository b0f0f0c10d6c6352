"""One query a row is attended as torch attends it, whatever the heads, the mask and the layout of the cache."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from resilin.models.attention_core import AttentionCore
from resilin.models.decoder_settings import DecoderSettings
from resilin.models.mask import Mask
from resilin.models.one_query import one_query, takes


@pytest.mark.parametrize(("heads", "key_heads"), [(4, 4), (4, 2), (6, 1)])
@pytest.mark.parametrize("masked", ["no", "rows", "all alike"])
def test_it_is_softmax_attention(heads: int, key_heads: int, masked: str) -> None:
    generator = torch.Generator().manual_seed(0)
    B, S, D = 9, 7, 8
    q = torch.randn(B, heads, 1, D, generator=generator)
    # The first keys of a larger cache, as decoding reads them.
    k, v = (torch.randn(B, key_heads, 12, D, generator=generator)[:, :, :S] for _ in range(2))
    seen = None
    if masked != "no":
        seen = torch.rand(B if masked == "rows" else 1, 1, S, generator=generator) < 0.5
        seen[..., 0] = True
    expected = F.scaled_dot_product_attention(
        q, k, v, attn_mask=None if seen is None else seen[:, None], scale=0.3, enable_gqa=True
    )
    with torch.inference_mode():
        assert takes(q, causal=False)
        torch.testing.assert_close(one_query(q, k, v, seen, 0.3), expected, rtol=1e-5, atol=1e-6)
        settings = DecoderSettings(hidden_size=8 * heads, heads=heads, kv_heads=key_heads, attention_scale=0.3)
        core = AttentionCore(settings)(q, k, v, Mask(causal=False, seen_BQS=seen))
    torch.testing.assert_close(core, expected, rtol=1e-5, atol=1e-6)


def test_gradients_several_queries_and_few_rows_go_elsewhere() -> None:
    q = torch.zeros(9, 2, 1, 4)
    assert not takes(q, causal=False)  # gradients are on
    with torch.no_grad():
        assert takes(q, causal=False)
        assert not takes(q, causal=True)
        assert not takes(q[:2], causal=False)
        assert not takes(q.expand(-1, -1, 3, -1), causal=False)
        assert not takes(q.double(), causal=False)
