from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kept_memory import kept_bytes
from torch.utils.flop_counter import FlopCounterMode

from resilin.models.decoder import Decoder
from resilin.models.decoder_settings import DecoderSettings, MoESettings
from resilin.models.flops import forward_flops_per_token, parameter_counts, train_flops_per_token
from resilin.models.memory import activation_bytes, memory_estimate

MIXTURES = st.one_of(
    st.none(),
    st.builds(
        MoESettings,
        experts=st.integers(2, 4),
        experts_per_token=st.integers(1, 2),
        expert_size=st.just(24),
        shared_size=st.sampled_from([0, 8]),
        dense_layers=st.sampled_from([(), (0,)]),
    ),
)


@settings(max_examples=40, deadline=None)
@given(
    layers=st.integers(1, 3),
    kv_heads=st.sampled_from([0, 1, 2]),
    head_size=st.sampled_from([None, 6]),
    gated=st.booleans(),
    qk_norm=st.sampled_from(["none", "rms", "layer", "transplant"]),
    over=st.sampled_from(["head", "width"]),
    biases=st.tuples(st.booleans(), st.booleans(), st.booleans()),
    tie=st.booleans(),
    moe=MIXTURES,
)
def test_parameter_counts_are_those_of_the_module(layers, kv_heads, head_size, gated, qk_norm, over, biases, tie, moe):
    chosen = DecoderSettings(
        vocab_size=37,
        hidden_size=16,
        layers=layers,
        heads=4,
        kv_heads=kv_heads,
        head_size=head_size,
        gated=gated,
        qk_norm=qk_norm,
        qk_norm_over=over if qk_norm != "none" else "head",
        qkv_bias=biases[0],
        out_bias=biases[1],
        mlp_bias=biases[2] and moe is None,
        tie_embeddings=tie,
        moe=moe,
    )
    model = Decoder(chosen, seed=None, device="meta")
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    counts = parameter_counts(chosen)
    assert counts.total == sum(sizes.values())
    assert counts.non_embedding == sum(n for name, n in sizes.items() if name not in ("embed.weight", "head.weight"))
    idle = sum(n for name, n in sizes.items() if ".experts." in name)
    share = moe.experts_per_token / moe.experts if moe else 0.0
    assert counts.active == counts.total - idle + round(idle * share)


def test_forward_operations_are_those_that_torch_counts_but_for_the_masked_half_of_attention():
    chosen = DecoderSettings(
        vocab_size=64, hidden_size=32, layers=2, heads=4, kv_heads=2, mlp_size=48, attention_backend="eager"
    )
    model, T = Decoder(chosen), 16
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.logits(model(torch.zeros(3, T, dtype=torch.int64)).hidden_BTD)
    attention = 4 * 32 * 2  # per key seen and token, both layers
    want = counter.get_total_flops() / (3 * T) - attention * (T - (T + 1) / 2)
    assert forward_flops_per_token(chosen, T) == pytest.approx(want, rel=1e-12)
    assert train_flops_per_token(chosen, T) == 3 * forward_flops_per_token(chosen, T)


def test_a_window_saves_exactly_the_keys_it_hides():
    T, window = 20, 6
    base = {"vocab_size": 64, "hidden_size": 32, "layers": 1, "heads": 4}
    seen = sum(min(t + 1, window) for t in range(T)) / T
    full = sum(t + 1 for t in range(T)) / T
    saved = forward_flops_per_token(DecoderSettings(**base), T) - forward_flops_per_token(
        DecoderSettings(**base, sliding_window=window), T
    )
    assert saved == pytest.approx(4 * 32 * (full - seen))


@pytest.mark.parametrize(
    "more",
    [{}, {"gated": False, "norm": "layer", "activation": "gelu"}, {"qk_norm": "rms"}],
    ids=str,
)
def test_estimated_activations_are_what_autograd_keeps(more):
    chosen = DecoderSettings(vocab_size=64, hidden_size=128, layers=4, heads=4, kv_heads=2, mlp_size=344, **more)
    model, tokens = Decoder(chosen), torch.zeros(2, 64, dtype=torch.int64)
    assert activation_bytes(chosen, 2, 64, logit_rows=0) == pytest.approx(kept_bytes(model, tokens), rel=0.12)


def test_recomputing_more_keeps_less():
    def total(kind):
        chosen = DecoderSettings(vocab_size=512, hidden_size=256, layers=8, recompute=kind)
        return memory_estimate(Decoder(chosen, seed=None, device="meta"), 8, 256).total

    assert total("block") < total("selective") < total("none")
