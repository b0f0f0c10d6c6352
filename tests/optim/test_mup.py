from __future__ import annotations

from typing import Any

import pytest
import torch

from resilin.models.decoder import Decoder
from resilin.models.decoder_settings import DecoderSettings
from resilin.optim.adamw import AdamW
from resilin.optim.mup import learning_rate_scales, scaled_model


def decoder(width: int, **fields: Any) -> Decoder:
    settings = DecoderSettings(
        vocab_size=13,
        hidden_size=width,
        layers=2,
        heads=2,
        mlp_size=2 * width,
        init="fan_in",
        qk_norm="rms",
        **fields,
    )
    return Decoder(settings, seed=0)


def trained(model: Decoder, **fields: Any) -> dict[str, torch.Tensor]:
    optimizer = AdamW(lr=0.01, **fields).build(model, 4)
    for step in range(4):
        for name, p in model.named_parameters():
            g = torch.Generator().manual_seed(step * 100 + len(name))
            p.grad = torch.randn(p.shape, generator=g)
        optimizer.step(step)
    return {name: p.detach() for name, p in model.named_parameters()}


@pytest.mark.parametrize("decay", ["coupled", "independent"])
def test_at_base_width_the_run_is_the_baseline_to_the_bit(decay: str) -> None:
    fields = {"decay": decay, "weight_decay": 0.01}
    base, mup = trained(decoder(32), **fields), trained(decoder(32), mup_base_width=32, **fields)
    for name, value in base.items():
        assert torch.equal(value, mup[name]), name


def test_learning_rates_of_linear_layers_fall_with_the_width_and_nothing_else_is_touched() -> None:
    model = decoder(64)
    scales = learning_rate_scales(model, 32)
    for name, parameter in model.named_parameters():
        if name == "embed.weight" or parameter.ndim == 1:
            assert name not in scales
        else:
            base = decoder(32).get_parameter(name)
            assert scales[name] == base.shape[1] / parameter.shape[1]  # base fan-in / fan-in of each layer
    assert scales["head.weight"] == 0.5


def test_a_model_whose_width_cannot_be_told_is_refused() -> None:
    with pytest.raises(ValueError, match=r"nn\.Embedding"):
        AdamW(mup_base_width=32).build(torch.nn.Linear(3, 3), 10)


def test_a_head_tied_to_the_embedding_is_left_alone() -> None:
    assert "embed.weight" not in learning_rate_scales(decoder(64, tie_embeddings=True), 32)


def test_the_first_step_of_a_layer_is_scaled_and_its_independent_decay_is_not() -> None:
    def first(**fields: Any) -> torch.Tensor:
        model = decoder(64)
        optimizer = AdamW(
            lr=0.01, mup_base_width=32, schedule={"use": "resilin.optim.schedule:Constant", "warmup": 0}, **fields
        ).build(model, 1)
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step(0)
        assert model.head is not None
        return model.head.weight.detach()

    start = decoder(64).head_weight.detach()
    torch.testing.assert_close(first(weight_decay=0.0), start - 0.005)
    torch.testing.assert_close(first(weight_decay=0.1, decay="independent"), 0.9 * start - 0.005)
    torch.testing.assert_close(first(weight_decay=0.1, decay="coupled"), (1 - 0.0005) * start - 0.005)


def test_the_levels_change_what_the_paper_changes() -> None:
    base = decoder(64).settings
    assert scaled_model(base, "simple", 32) == base
    middle = scaled_model(base, "intermediate", 32)
    assert middle == base.model_copy(update={"mup_base_size": 32})
    full = scaled_model(base, "full", 32)
    assert full.attention_scale == 1 / 32
    assert full.zero_query_init

    simple, head, query = Decoder(base, seed=0), Decoder(middle, seed=0), Decoder(full, seed=0)
    ratio = head.head_weight.std() / simple.head_weight.std()
    assert float(ratio.detach()) == pytest.approx((32 / 64) ** 0.5, rel=1e-4)
    assert not query.get_parameter("blocks.1.attention.q.weight").any()
    assert query.get_parameter("blocks.1.attention.k.weight").any()


def test_at_base_width_the_intermediate_level_starts_from_the_same_weights() -> None:
    base = decoder(32).settings
    a, b = Decoder(base, seed=0), Decoder(scaled_model(base, "intermediate", 32), seed=0)
    for name, p in a.named_parameters():
        torch.testing.assert_close(p, b.get_parameter(name), rtol=1e-6, atol=0, msg=name)
