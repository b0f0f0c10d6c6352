"""Random small models of every family: our logits are those of `transformers`, in both directions."""

from __future__ import annotations

import pytest
import torch

from resilin.models.cache import KVCache
from resilin.models.huggingface import load_pretrained, save_pretrained

transformers = pytest.importorskip("transformers")

SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
MOE = {"moe_intermediate_size": 24, "num_experts": 6, "num_experts_per_tok": 2}

GLM = {
    "moe_intermediate_size": 24, "n_routed_experts": 6, "num_experts_per_tok": 2, "partial_rotary_factor": 1.0,
    "num_mtp_layers": 0,
}  # fmt: skip


def rope(kind, **more):
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 500.0, **more}}


FAMILIES = {
    "llama": ("Llama", {}),
    "llama tied, biases, wide heads": (
        "Llama",
        {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True, "head_dim": 12},
    ),
    "llama gelu": ("Llama", {"hidden_act": "gelu"}),
    "llama tanh gelu": ("Llama", {"hidden_act": "gelu_pytorch_tanh"}),
    "mistral": ("Mistral", {"sliding_window": None}),
    "mistral window": ("Mistral", {"sliding_window": 7}),
    "qwen2": ("Qwen2", {}),
    "qwen2 window in upper layers": (
        "Qwen2",
        {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    ),
    "qwen3": ("Qwen3", {"head_dim": 16}),
    "qwen3 window, biases": (
        "Qwen3",
        {
            "head_dim": 8,
            "attention_bias": True,
            "use_sliding_window": True,
            "sliding_window": 5,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
    "mixtral": ("Mixtral", {"num_local_experts": 5, "num_experts_per_tok": 2}),
    "mixtral window": ("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 3, "sliding_window": 6}),
    "qwen3_moe": ("Qwen3Moe", {**MOE, "head_dim": 8, "norm_topk_prob": True}),
    "qwen3_moe unnormalised, some layers dense": (
        "Qwen3Moe",
        {**MOE, "decoder_sparse_step": 2, "mlp_only_layers": [0]},
    ),
    "qwen3_moe window": ("Qwen3Moe", {**MOE, "use_sliding_window": True, "sliding_window": 5}),
    "qwen2_moe": ("Qwen2Moe", {**MOE, "shared_expert_intermediate_size": 40}),
    "glm4_moe": ("Glm4Moe", {**GLM, "n_shared_experts": 2, "first_k_dense_replace": 1}),
    "glm4_moe no shared, normed heads, biases, unnormalised": (
        "Glm4Moe",
        {
            **GLM,
            "n_shared_experts": 0,
            "first_k_dense_replace": 0,
            "use_qk_norm": True,
            "attention_bias": True,
            "norm_topk_prob": False,
            "head_dim": 12,
        },
    ),
    "olmo2": ("Olmo2", {}),
    "olmo2 grouped, biases": ("Olmo2", {"num_key_value_heads": 2, "attention_bias": True}),
    "flex_olmo": ("FlexOlmo", {"num_experts": 5, "num_experts_per_tok": 3}),
    "flex_olmo normalised": ("FlexOlmo", {"num_experts": 4, "num_experts_per_tok": 2, "norm_topk_prob": True}),
    "rope linear": ("Llama", rope("linear", factor=3.0)),
    "rope dynamic": ("Llama", {**rope("dynamic", factor=4.0), "max_position_embeddings": 16}),
    "rope llama3": (
        "Llama",
        rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32),
    ),
    "rope yarn": ("Qwen3", {**rope("yarn", factor=4.0, original_max_position_embeddings=16), "head_dim": 8}),
    "rope yarn, own temperature": (
        "Mistral",
        rope(
            "yarn",
            factor=4.0,
            original_max_position_embeddings=16,
            attention_factor=0.7,
            beta_fast=8.0,
            beta_slow=2.0,
            truncate=False,
        ),
    ),
    "rope longrope": (
        "Llama",
        rope(
            "longrope",
            factor=4.0,
            short_factor=[1.0, 1.1, 1.2, 1.3],
            long_factor=[1.0, 2.0, 3.0, 4.0],
            original_max_position_embeddings=16,
        ),
    ),
}


def build(name: str):
    family, more = FAMILIES[name]
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**{**SIZES, **more}, attn_implementation="eager")
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():  # norms at 1 and biases at 0 would hide mistakes
        for key, parameter in model.named_parameters():
            if "norm" in key:
                parameter.uniform_(0.5, 1.5)
            elif key.endswith("bias"):
                parameter.normal_(0.0, 0.3)
        for key, buffer in model.named_buffers():
            if key.endswith("correction_bias"):
                buffer.normal_(0.0, 0.3)
    return model


def ours(model, tokens, **more):
    return model.logits(model(tokens, **more).hidden_BTD)


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("hf")
    theirs = build(request.param)
    theirs.save_pretrained(folder)
    return theirs, load_pretrained(folder)


@torch.no_grad()
def test_a_loaded_model_has_the_same_logits(pair):
    theirs, model = pair
    for length in (4, 24):
        tokens = torch.randint(0, 96, (2, length), generator=torch.Generator().manual_seed(length))
        expected = theirs(tokens).logits
        assert expected.std() > 0.3
        torch.testing.assert_close(ours(model, tokens), expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_saved_model_opens_in_transformers_with_the_same_logits(pair, tmp_path):
    _, model = pair
    save_pretrained(model, tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
    tokens = torch.randint(0, 96, (2, 24), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(again(tokens).logits, ours(model, tokens), atol=1e-5, rtol=1e-5)
    reread = load_pretrained(tmp_path)
    assert reread.settings == model.settings
    for (name, mine), (other, theirs) in zip(model.named_parameters(), reread.named_parameters(), strict=True):
        assert name == other
        assert torch.equal(mine, theirs)


@torch.no_grad()
def test_greedy_generation_agrees_token_for_token(pair):
    theirs, model = pair
    tokens = torch.randint(0, 96, (2, 6), generator=torch.Generator().manual_seed(2))
    expected = theirs.generate(
        tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=20, do_sample=False, pad_token_id=0
    )
    cache = KVCache.of(model, 2, 26)
    text, new = tokens, tokens
    for _ in range(20):
        new = ours(model, new, cache=cache)[:, -1].argmax(-1, keepdim=True)
        text = torch.cat([text, new], 1)
    assert torch.equal(text, expected)
