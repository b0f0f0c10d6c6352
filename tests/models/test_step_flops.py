"""What a training step costs where parts of the decoder are frozen, against what torch counts."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from resilin.models.decoder import Decoder
from resilin.models.decoder_settings import DecoderSettings
from resilin.models.flops import train_flops_per_token
from resilin.models.memory import memory_estimate
from resilin.models.settings import ModelContext
from resilin.models.step_flops import step_flops_per_token

SIZES = {"vocab_size": 64, "hidden_size": 32, "layers": 3, "heads": 4, "kv_heads": 2, "mlp_size": 48}
MIXTURE = {"experts": 4, "experts_per_token": 2, "expert_size": 24, "shared_size": 8, "dense_layers": (0,)}


def outline(**more) -> Decoder:
    return Decoder(DecoderSettings(**{**SIZES, **more}), seed=None, device="meta")


def counted(model: Decoder, rows: int = 5) -> float:
    """FLOPs that torch counts for a token; one token a text, so that no key is masked."""
    with FlopCounterMode(display=False) as counter:
        model.logits(model(torch.zeros(rows, 1, dtype=torch.int64)).hidden_BTD).sum().backward()
    return counter.get_total_flops() / rows


@pytest.mark.parametrize(
    "more", [{}, {"tie_embeddings": True}, {"gated": False}, {"moe": MIXTURE}, {"sliding_window": 6}], ids=str
)
def test_with_everything_trained_it_is_three_times_the_forward_pass(more) -> None:
    model = outline(**more)
    assert step_flops_per_token(model, 20) == pytest.approx(train_flops_per_token(model.settings, 20), rel=1e-12)


@pytest.mark.parametrize(
    "trained",
    [
        ("embed.weight",),
        ("head.weight",),
        ("norm.weight",),
        ("blocks.2.mlp.down.weight",),
        ("blocks.1.attention.q.weight",),
        ("blocks.1.attention_norm.weight",),
        ("blocks.0.mlp.gate.weight", "blocks.2.attention.o.weight"),
        ("blocks.1.attention.k.bias",),
    ],
    ids=str,
)
def test_what_is_frozen_costs_what_torch_counts_for_it(trained: tuple[str, ...]) -> None:
    model = Decoder(DecoderSettings(**SIZES, qkv_bias=True, attention_backend="eager"))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained)
    assert step_flops_per_token(model, 1) == counted(model)


def test_settings_that_build_something_else_do_not_inherit_an_outline() -> None:
    class Other(DecoderSettings):
        def build(self, context: ModelContext) -> Decoder:
            return DecoderSettings(**SIZES).build(context)

    class Renamed(DecoderSettings):
        pass

    assert Other(**SIZES).outline(ModelContext(0)) is None
    assert isinstance(Renamed(**SIZES).outline(ModelContext(0)), Decoder)


def test_memory_counts_gradients_and_moments_of_trained_parameters_only_and_weights_as_stored() -> None:
    model = outline()
    whole = memory_estimate(model, 2, 16)
    total = sum(p.numel() for p in model.parameters())
    assert (whole.weights, whole.gradients, whole.moments) == (4 * total, 4 * total, 8 * total)
    model.requires_grad_(False)
    model.norm.weight.requires_grad_(True)
    model.embed.weight.data = model.embed.weight.data.to(torch.bfloat16)
    part = memory_estimate(model, 2, 16)
    assert part.weights == 4 * total - 2 * 64 * 32
    assert (part.gradients, part.moments) == (4 * 32, 8 * 32)
