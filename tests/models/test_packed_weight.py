"""A packed weight multiplies as it did before it was packed."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from resilin.models.decoder import Decoder
from resilin.models.decoder_settings import DecoderSettings
from resilin.models.linear import PackedWeight

packs = pytest.mark.skipif(not PackedWeight.takes(torch.zeros(1)), reason="a torch without oneDNN")


@packs
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("shape", [(96, 8), (6133, 16), (7, 5)])
def test_any_number_of_rows_gives_the_same_product(threads: int, shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=generator)
    packed = PackedWeight(weight)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.inference_mode():
            for rows in (1, 2, 31, 70):
                x = torch.randn(rows, shape[1], generator=generator)
                torch.testing.assert_close(packed(x), F.linear(x, weight), rtol=1e-5, atol=1e-5)
    finally:
        torch.set_num_threads(before)


def test_only_float32_on_the_cpu_is_packed() -> None:
    assert not PackedWeight.takes(torch.zeros(2, 2, dtype=torch.bfloat16))
    assert not PackedWeight.takes(torch.zeros(2, 2, dtype=torch.float64))
    assert not PackedWeight.takes(torch.zeros(2, 2, device="meta"))


@packs
def test_a_decoder_caps_the_logits_of_a_packed_head() -> None:
    model = Decoder(DecoderSettings(vocab_size=40, hidden_size=16, layers=1, heads=2, mlp_size=16, logit_softcap=2.0))
    hidden = 30 * torch.randn(3, 16)
    with torch.inference_mode():
        packed = model.logits(hidden, PackedWeight(model.head_weight))
        torch.testing.assert_close(packed, model.logits(hidden))
    assert float(packed.abs().max()) > 1.5
