"""Which Hugging Face family a decoder's settings fit, and its `config.json` there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from resilin.models.decoder_settings import DecoderSettings
from resilin.models.huggingface_rope import write_rope
from resilin.models.weight_files import ModelFolderError

_ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "qwen2_moe": "Qwen2MoeForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "glm4_moe": "Glm4MoeForCausalLM",
    "olmo2": "Olmo2ForCausalLM",
    "flex_olmo": "FlexOlmoForCausalLM",
}
_MIXTURES = ("mixtral", "qwen2_moe", "qwen3_moe", "glm4_moe", "flex_olmo")
_OLMO = ("olmo2", "flex_olmo")
_ACTIVATIONS = {"silu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh", "relu2": "relu2"}


def _common_blockers(settings: DecoderSettings) -> list[str]:
    """Settings that no family has."""
    found = []
    if settings.norm != "rms":
        found.append(f'norm = "{settings.norm}": all of them use "rms"')
    if not settings.gated:
        found.append("gated = false: all of them have gated feed-forwards (gated = true)")
    if settings.qk_norm in ("layer", "transplant"):
        found.append(f'qk_norm = "{settings.qk_norm}": Qwen3 and OLMo 2 have "rms", the others "none"')
    if settings.sizes_differ:
        found.append("layer_sizes: in all of them all blocks have the same sizes")
    if settings.loop is not None:
        found.append("loop: in all of them blocks are run once")
    if settings.chains is not None:
        found.append("chains: in all of them every layer reads the whole stream")
    if settings.moe is not None and settings.moe.router_bias:
        found.append("moe.router_bias = true: none of them has routers with a bias")
    for name in ("attention_softcap", "logit_softcap"):
        if getattr(settings, name) is not None:
            found.append(f"{name} = {getattr(settings, name)}: none of them caps logits")
    scale = settings.attention_scale
    if scale is not None and abs(scale * settings.head_width**0.5 - 1) > 1e-6:
        found.append(f"attention_scale = {scale}: all of them use 1 / sqrt(head_size)")
    return found


def _family_blockers(settings: DecoderSettings, family: str) -> list[str]:
    """What keeps the settings from one family."""
    s, found = settings, []

    def need(holds: bool, text: str) -> None:
        if not holds:
            found.append(text)

    need((s.moe is not None) == (family in _MIXTURES), "moe" + (" = none" * (not s.moe)))
    if family != "glm4_moe":
        need((s.qk_norm == "rms") == (family.startswith("qwen3") or family in _OLMO), f'qk_norm = "{s.qk_norm}"')
    over = "width" if family in _OLMO else "head"
    need(s.qk_norm == "none" or s.qk_norm_over == over, f'qk_norm_over = "{s.qk_norm_over}"')
    need((s.norm_place == "after") == (family in _OLMO), f'norm_place = "{s.norm_place}"')
    if family == "qwen2":
        need(s.qkv_bias, "qkv_bias = false")
    if family in ("mistral", "mixtral"):
        need(not s.qkv_bias, "qkv_bias = true")
    if family in ("llama", "qwen3", "qwen3_moe", *_OLMO):
        need(s.qkv_bias == s.out_bias, "qkv_bias differs from out_bias")
    else:
        need(not s.out_bias, "out_bias = true")
    need(family == "llama" or not s.mlp_bias, "mlp_bias = true")
    if family == "llama" or family in _OLMO:  # the config is refused by `transformers` otherwise
        need(s.hidden_size % s.heads == 0, f"hidden_size = {s.hidden_size}, no multiple of heads = {s.heads}")
    need(family not in ("llama", "glm4_moe", *_OLMO) or s.sliding_window is None, "sliding_window")
    if family in ("mistral", "mixtral", "qwen3_moe"):
        need(s.window_layers is None, "window_layers")
    if s.moe is not None and family == "glm4_moe":
        need(s.moe.routing == "sigmoid_topk", f'moe.routing = "{s.moe.routing}"')
        need(s.moe.balance == "bias", f'moe.balance = "{s.moe.balance}"')
        need(s.moe.experts > 1, "moe.experts = 1")
        whole = s.moe.shared_size % s.moe.expert_size == 0
        need(whole, f"moe.shared_size = {s.moe.shared_size}, no multiple of moe.expert_size = {s.moe.expert_size}")
        need(not s.moe.shared_gate, "moe.shared_gate = true")
        first = tuple(range(len(s.moe.dense_layers)))
        need(s.moe.dense_layers == first, f"moe.dense_layers = {list(s.moe.dense_layers)}, which are not the first")
    elif s.moe is not None:
        need(s.moe.routing != "sigmoid_topk", f'moe.routing = "{s.moe.routing}"')
        need(s.moe.balance == "none", f'moe.balance = "{s.moe.balance}"')
        need(bool(s.moe.shared_size) == (family == "qwen2_moe"), f"moe.shared_size = {s.moe.shared_size}")
        need(s.moe.shared_gate == (family == "qwen2_moe"), f"moe.shared_gate = {str(s.moe.shared_gate).lower()}")
        if family == "mixtral":
            normalised = s.moe.normalise_weights or s.moe.routing == "topk_softmax"
            need(normalised, "moe.normalise_weights = false")
        if family in ("mixtral", "flex_olmo"):
            need(not s.moe.dense_layers, "moe.dense_layers")
    return found


def fits(settings: DecoderSettings, family: str) -> bool:
    """Whether a family computes exactly what these settings describe."""
    return not _common_blockers(settings) and not _family_blockers(settings, family)


def family_of(settings: DecoderSettings) -> str:
    """The first family that computes exactly what these settings describe.

    Raises:
        ModelFolderError: none does; the text says which settings stand in the way, for which family.
    """
    common = _common_blockers(settings)
    blockers = {family: _family_blockers(settings, family) for family in _ARCHITECTURES}
    fitting = [family for family, found in blockers.items() if not found]
    if fitting and not common:
        return fitting[0]
    lines = common or [f"{family}: not with {', '.join(found)}" for family, found in blockers.items()]
    raise ModelFolderError(
        "these settings fit no Hugging Face family (" + ", ".join(_ARCHITECTURES) + "):\n  " + "\n  ".join(lines)
    )


def _moe_keys(settings: DecoderSettings, family: str) -> dict[str, Any]:
    moe = settings.moe
    if moe is None:
        return {"intermediate_size": settings.feed_forward_size}
    if family == "mixtral":
        return {
            "intermediate_size": moe.expert_size,
            "num_local_experts": moe.experts,
            "num_experts_per_tok": moe.experts_per_token,
        }
    if family == "flex_olmo":
        return {
            "intermediate_size": moe.expert_size,
            "num_experts": moe.experts,
            "num_experts_per_tok": moe.experts_per_token,
            "norm_topk_prob": moe.normalise_weights or moe.routing == "topk_softmax",
        }
    if family == "glm4_moe":
        return {
            "intermediate_size": settings.feed_forward_size,
            "moe_intermediate_size": moe.expert_size,
            "n_routed_experts": moe.experts,
            "n_shared_experts": moe.shared_size // moe.expert_size,
            "num_experts_per_tok": moe.experts_per_token,
            "norm_topk_prob": moe.normalise_weights,
            "first_k_dense_replace": len(moe.dense_layers),
            "routed_scaling_factor": 1.0,
            "n_group": 1,
            "topk_group": 1,
            "num_nextn_predict_layers": 0,
        }
    keys = {
        "intermediate_size": settings.feed_forward_size,
        "moe_intermediate_size": moe.expert_size,
        "num_experts": moe.experts,
        "num_experts_per_tok": moe.experts_per_token,
        "norm_topk_prob": moe.normalise_weights or moe.routing == "topk_softmax",
        "decoder_sparse_step": 1,
        "mlp_only_layers": list(moe.dense_layers),
    }
    if family == "qwen2_moe":
        keys |= {"shared_expert_intermediate_size": moe.shared_size, "qkv_bias": settings.qkv_bias}
    return keys


def _window_keys(settings: DecoderSettings, family: str) -> dict[str, Any]:
    if family in ("mistral", "mixtral"):
        return {"sliding_window": settings.sliding_window}
    if family in ("llama", "glm4_moe") or family in _OLMO:
        return {}
    keys: dict[str, Any] = {
        "use_sliding_window": settings.sliding_window is not None,
        "sliding_window": settings.sliding_window,
    }
    if family != "qwen3_moe":
        windows = [settings.window_of(layer) for layer in range(settings.layers)]
        keys["layer_types"] = ["full_attention" if w is None else "sliding_attention" for w in windows]
        # only read where `layer_types` is absent
        keys["max_window_layers"] = 0 if settings.sliding_window is not None else settings.layers
    return keys


def config_from_settings(
    settings: DecoderSettings, dtype: str = "float32", special_ids: Mapping[str, int | None] | None = None
) -> dict[str, Any]:
    """The content of `config.json`.

    Args:
        settings: of the decoder.
        dtype: of the stored weights.
        special_ids: `bos_token_id`, `eos_token_id`, `pad_token_id`, where there are such tokens.

    Raises:
        ModelFolderError: the settings fit no family.
    """
    family = family_of(settings)
    config: dict[str, Any] = {
        "architectures": [_ARCHITECTURES[family]],
        "model_type": family,
        "dtype": dtype,
        "vocab_size": settings.vocab_size,
        "hidden_size": settings.hidden_size,
        "num_hidden_layers": settings.layers,
        "num_attention_heads": settings.heads,
        "num_key_value_heads": settings.key_heads,
        "head_dim": settings.head_width,
        "hidden_act": _ACTIVATIONS[settings.activation],
        "rms_norm_eps": settings.norm_eps,
        "initializer_range": min(settings.init_std, 1.0),
        "max_position_embeddings": settings.max_positions,
        "rope_parameters": write_rope(settings),
        "rope_theta": settings.rope_theta,
        "tie_word_embeddings": settings.tie_embeddings,
        "attention_dropout": 0.0,
        "use_cache": True,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
        **(special_ids or {}),
        **_moe_keys(settings, family),
        **_window_keys(settings, family),
    }
    if family in ("llama", "qwen3", "qwen3_moe", "glm4_moe", *_OLMO):
        config["attention_bias"] = settings.qkv_bias
    if family == "glm4_moe":  # which turns half of each head unless it is told
        config["use_qk_norm"] = settings.qk_norm == "rms"
        config["partial_rotary_factor"] = config["rope_parameters"]["partial_rotary_factor"] = 1.0
    if family == "llama":
        config["mlp_bias"] = settings.mlp_bias
    if settings.rope_scaling is not None:
        # transformers 4 and other readers look here
        config["rope_scaling"] = {key: v for key, v in config["rope_parameters"].items() if key != "rope_theta"}
    return config
