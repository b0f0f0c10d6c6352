"""Small decoders of every kind, and budgets that fit them."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import strategies as st

from resilin.models.decoder import Decoder
from resilin.models.decoder_settings import DecoderSettings, MoESettings
from resilin.nested import Budget

LAYERS, HIDDEN, FFN, EXPERTS = 3, 16, 24, 4

MIXTURES = st.one_of(
    st.none(),
    st.builds(
        MoESettings,
        experts=st.just(EXPERTS),
        experts_per_token=st.integers(1, 2),
        expert_size=st.just(FFN),
        routing=st.sampled_from(["softmax_topk", "topk_softmax", "sigmoid_topk"]),
        balance=st.sampled_from(["none", "bias"]),
        shared_size=st.sampled_from([0, 8]),
        shared_gate=st.just(False),
        dense_layers=st.sampled_from([(), (0,), (1,)]),
    ),
)


def _settings(moe: MoESettings | None, qk_norm: str, over: str, **more: Any) -> DecoderSettings:
    if moe is not None:
        more["mlp_bias"] = False
        if moe.shared_size and more["gated"]:
            moe = moe.model_copy(update={"shared_gate": True})
    return DecoderSettings(
        vocab_size=37,
        hidden_size=HIDDEN,
        layers=LAYERS,
        heads=4,
        mlp_size=FFN,
        qk_norm=qk_norm,
        qk_norm_over=over if qk_norm != "none" else "head",
        moe=moe,
        init_std=0.4,
        max_positions=32,
        **more,
    )


DECODERS = st.builds(
    _settings,
    moe=MIXTURES,
    qk_norm=st.sampled_from(["none", "rms", "layer", "transplant"]),
    over=st.sampled_from(["head", "width"]),
    kv_heads=st.sampled_from([0, 1, 2]),
    gated=st.booleans(),
    norm=st.sampled_from(["rms", "layer"]),
    activation=st.sampled_from(["silu", "gelu", "gelu_tanh"]),
    qkv_bias=st.booleans(),
    out_bias=st.booleans(),
    mlp_bias=st.booleans(),
    tie_embeddings=st.booleans(),
    sliding_window=st.sampled_from([None, 3]),
    head_size=st.sampled_from([None, 6]),
)


@st.composite
def budgets(draw: st.DrawFn, settings: DecoderSettings) -> Budget:
    """Budgets that fit a decoder."""
    keys, group = settings.key_heads, settings.heads // settings.key_heads

    def sizes(one: st.SearchStrategy[Any]) -> Any:
        each = st.lists(one, min_size=LAYERS, max_size=LAYERS).map(tuple)
        return draw(st.one_of(st.none(), one, each))

    tree: dict[str, Any] = {"ffn": sizes(st.integers(1, FFN))}
    pairs = draw(
        st.lists(st.tuples(st.integers(1, keys), st.integers(1, group)), min_size=LAYERS, max_size=LAYERS) | st.none()
    )
    if pairs is not None:
        tree |= {"heads": tuple(k * g for k, g in pairs), "kv_heads": tuple(k for k, _ in pairs)}
    tree["hidden"] = draw(st.none() | st.integers(4, HIDDEN))
    tree["skip"] = draw(st.sampled_from([(), (0,), (1,), (0, 2), (2,)]))
    if settings.moe is not None:
        chosen = st.integers(settings.moe.experts_per_token, EXPERTS)
        named = st.sets(st.integers(0, EXPERTS - 1), min_size=2).map(lambda found: tuple(sorted(found)))
        each = st.lists(st.one_of(st.none(), chosen, named), min_size=LAYERS, max_size=LAYERS).map(tuple)
        tree["experts"] = draw(st.one_of(st.none(), chosen, each))
        tree["top_k"] = draw(st.sampled_from([None, 1]))
    return Budget(**tree)


@st.composite
def cases(draw: st.DrawFn) -> tuple[DecoderSettings, Budget]:
    """A decoder's settings and a budget for it."""
    settings = draw(DECODERS)
    return settings, draw(budgets(settings))


def decoder(settings: DecoderSettings, dtype: torch.dtype = torch.float64) -> Decoder:
    """With weights whose norms and biases are not those of a new model."""
    model = Decoder(settings, seed=3).to(dtype)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator, dtype=dtype)
    return model


TOKENS = torch.tensor([[1, 5, 9, 2, 30, 4, 11], [3, 3, 36, 7, 0, 12, 8]])
