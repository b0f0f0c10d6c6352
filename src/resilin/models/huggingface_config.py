"""A Hugging Face `config.json` as decoder settings.

Every key is used, known to leave the numbers unchanged, or refused by name: an ignored key would be a model that
loads and quietly computes something else.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from resilin.config.errors import explain
from resilin.models.decoder_settings import DecoderSettings, MoESettings
from resilin.models.huggingface_hybrid import MODEL_TYPE as HYBRID
from resilin.models.huggingface_hybrid import hybrid_settings
from resilin.models.huggingface_rope import read_rope
from resilin.models.own_config import MODEL_TYPE, own_settings
from resilin.models.weight_files import ModelFolderError

FAMILIES = (
    "llama", "mistral", "qwen2", "qwen3", "mixtral", "qwen2_moe", "qwen3_moe", "glm4_moe", "olmo2", "flex_olmo", HYBRID,
)  # fmt: skip
_OLMO = ("olmo2", "flex_olmo")

_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "relu2": "relu2",
}

# Keys that say nothing about what the network computes.
_HARMLESS = frozenset(
    {
        "_attn_implementation",
        "_name_or_path",
        "architectures",
        "attn_implementation",
        "bos_token_id",
        "decoder_start_token_id",
        "dtype",
        "eos_token_id",
        "id2label",
        "is_decoder",
        "is_encoder_decoder",
        "label2id",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "pad_token_id",
        "problem_type",
        "return_dict",
        "router_aux_loss_coef",
        "sep_token_id",
        "task_specific_params",
        "tokenizer_class",
        "torch_dtype",
        "transformers_version",
        "unk_token_id",
        "unsloth_fixed",
        "unsloth_version",
        "use_cache",
    }
)
# Keys that change the numbers, with the one value that leaves them alone.
_NEUTRAL: dict[str, Any] = {
    "attention_dropout": 0.0,
    "chunk_size_feed_forward": 0,
    "n_group": 1,
    "num_mtp_layers": 0,
    "num_nextn_predict_layers": 0,
    "partial_rotary_factor": 1.0,
    "pretraining_tp": 1,
    "routed_scaling_factor": 1.0,
    "router_jitter_noise": 0.0,
    "topk_group": 1,
}


class _Reader:
    """Takes keys out of a config and remembers which were taken."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.config = config
        self.taken: set[str] = {"model_type"}

    def get(self, key: str, default: Any = None) -> Any:
        """The value of `key`; an absent key and null both mean `default`."""
        self.taken.add(key)
        value = self.config.get(key)
        return default if value is None else value

    def need(self, key: str) -> Any:
        """The value of a key that must be there."""
        value = self.get(key)
        if value is None:
            raise ModelFolderError(f"config.json: lacks {key!r}")
        return value

    def refuse_rest(self) -> None:
        """Refuse every key that was neither taken nor known to be harmless."""
        for key, value in self.config.items():
            # Keys with a leading underscore are transformers' own notes.
            if key in self.taken or key in _HARMLESS or key.startswith("_") or value is None:
                continue
            if key in ("auto_map", "quantization_config"):
                reason = {
                    "auto_map": "the folder brings its own code, which Resilin does not run",
                    "quantization_config": "the weights are quantised; export them in bf16 or fp32 first",
                }[key]
                raise ModelFolderError(f"config.json: {key!r}: {reason}")
            if key in _NEUTRAL:
                if value == _NEUTRAL[key]:
                    continue
                raise ModelFolderError(
                    f"config.json: {key!r} is {value!r}; this decoder computes {key} = {_NEUTRAL[key]!r} only"
                )
            raise ModelFolderError(
                f"config.json: {key!r} = {value!r} is not known for model_type {self.config.get('model_type')!r}; it "
                "may change what the model computes, so it is not ignored. Remove it where it does not matter"
            )


def _windows(read: _Reader, family: str, layers: int) -> dict[str, Any]:
    """`sliding_window` and `window_layers`."""
    size = read.get("sliding_window") or None
    if family in ("mistral", "mixtral"):
        kinds = read.get("layer_types")
        return _windows_by_kind(size, kinds) if kinds else {"sliding_window": size}
    if family in ("llama", "glm4_moe") or family in _OLMO:
        if size is not None:
            raise ModelFolderError(f"config.json: 'sliding_window' is not known for model_type {family!r}")
        kinds = read.get("layer_types")
        return _windows_by_kind(None, kinds) if kinds else {}
    used = read.get("use_sliding_window", False)
    first = read.get("max_window_layers", 28)
    kinds = read.get("layer_types")
    if kinds:
        return _windows_by_kind(size if used else None, kinds)
    if not used or size is None:
        return {}
    if family == "qwen3_moe":
        return {"sliding_window": size}
    if family == "qwen2_moe":
        chosen = [layer for layer in range(layers) if layer < first and layer % 2 == 0]
    else:
        chosen = list(range(first, layers))
    return {"sliding_window": size, "window_layers": chosen} if chosen else {}


def _windows_by_kind(size: int | None, kinds: list[str]) -> dict[str, Any]:
    unknown = sorted(set(kinds) - {"full_attention", "sliding_attention"})
    if unknown:
        raise ModelFolderError(
            f"config.json: 'layer_types' names {unknown[0]!r}; known are 'full_attention' and 'sliding_attention'"
        )
    chosen = [layer for layer, kind in enumerate(kinds) if kind == "sliding_attention"]
    if not chosen:
        return {}
    if size is None:
        raise ModelFolderError("config.json: 'layer_types' asks for sliding attention; 'sliding_window' is not set")
    return {"sliding_window": size, "window_layers": None if len(chosen) == len(kinds) else chosen}


def _biases(read: _Reader, family: str) -> dict[str, bool]:
    if family in ("llama", "qwen3", "qwen3_moe", *_OLMO):
        both = bool(read.get("attention_bias", False))
        mlp = bool(read.get("mlp_bias", False)) if family == "llama" else False
        return {"qkv_bias": both, "out_bias": both, "mlp_bias": mlp}
    if family == "glm4_moe":
        return {"qkv_bias": bool(read.get("attention_bias", False))}
    if family == "qwen2_moe":
        return {"qkv_bias": bool(read.get("qkv_bias", True))}
    return {"qkv_bias": family == "qwen2"}


def _experts(read: _Reader, family: str, layers: int) -> tuple[MoESettings | None, int]:
    """The mixture and the width of the dense feed-forward."""
    dense_size = int(read.need("intermediate_size"))
    if family == "mixtral":
        moe = MoESettings(
            experts=read.get("num_local_experts", 8),
            experts_per_token=read.get("num_experts_per_tok", 2),
            expert_size=dense_size,
        )
        return moe, dense_size
    if family == "glm4_moe":
        size = int(read.need("moe_intermediate_size"))
        moe = MoESettings(
            experts=read.need("n_routed_experts"),
            experts_per_token=read.need("num_experts_per_tok"),
            expert_size=size,
            routing="sigmoid_topk",
            balance="bias",
            normalise_weights=bool(read.get("norm_topk_prob", True)),
            shared_size=size * int(read.get("n_shared_experts", 1)),
            dense_layers=tuple(range(int(read.get("first_k_dense_replace", 1)))),
        )
        return moe, dense_size
    if family != "flex_olmo" and not family.endswith("_moe"):
        return None, dense_size
    experts = read.get("num_experts")
    experts = read.get("num_local_experts") if experts is None else experts
    if experts is None:
        raise ModelFolderError("config.json: lacks 'num_experts'")
    if family == "flex_olmo":
        moe = MoESettings(
            experts=experts,
            experts_per_token=read.get("num_experts_per_tok", 5),
            expert_size=dense_size,
            normalise_weights=bool(read.get("norm_topk_prob", False)),
        )
        return moe, dense_size
    every = read.get("decoder_sparse_step", 1)
    dense = set(read.get("mlp_only_layers", []))
    dense |= {layer for layer in range(layers) if every < 1 or (layer + 1) % every}
    moe = MoESettings(
        experts=experts,
        experts_per_token=read.need("num_experts_per_tok"),
        expert_size=read.need("moe_intermediate_size"),
        normalise_weights=bool(read.get("norm_topk_prob", False)),
        shared_size=read.need("shared_expert_intermediate_size") if family == "qwen2_moe" else 0,
        shared_gate=family == "qwen2_moe",
        dense_layers=tuple(sorted(dense)),
    )
    return moe, dense_size


def settings_from_config(config: Mapping[str, Any]) -> DecoderSettings:
    """Decoder settings that compute what a Hugging Face config describes.

    Args:
        config: the content of `config.json`, of transformers 4 or 5.

    Raises:
        ModelFolderError: another family, or a key that this decoder would have to ignore, by name.
    """
    family = config.get("model_type")
    if family == MODEL_TYPE:
        return own_settings(config)
    if family == HYBRID:
        return hybrid_settings(config, _HARMLESS)
    if family not in FAMILIES:
        raise ModelFolderError(f"config.json: model_type {family!r} is not one of {', '.join(FAMILIES)}")
    read = _Reader(config)
    layers, heads, hidden = (read.need(key) for key in ("num_hidden_layers", "num_attention_heads", "hidden_size"))
    activation = read.get("hidden_act", "silu")
    if activation not in _ACTIVATIONS:
        raise ModelFolderError(f"config.json: 'hidden_act' is {activation!r}; known are {', '.join(_ACTIVATIONS)}")
    head_size = read.get("head_dim", 128 if family == "qwen3" else None)
    positions = read.get("max_position_embeddings", 2048)
    theta, scaling = read_rope(read.get, positions)
    # The key-value heads of Mistral and Mixtral default to 8, not to the query heads.
    kv_heads = read.get("num_key_value_heads", 8 if family in ("mistral", "mixtral") else heads)
    normed = family in ("qwen3", "qwen3_moe", *_OLMO)
    if family == "glm4_moe":
        normed = bool(read.get("use_qk_norm", False))
        told = (read.get("rope_parameters") or {}).get("partial_rotary_factor", 0.5)
        if (turned := read.get("partial_rotary_factor", told)) != 1.0:
            raise ModelFolderError(
                f"config.json: 'partial_rotary_factor' is {turned!r} (0.5 where it is not told); this decoder turns "
                "whole heads only"
            )
    try:
        moe, mlp_size = _experts(read, family, layers)
        settings = DecoderSettings.model_validate(
            {
                "vocab_size": read.need("vocab_size"),
                "hidden_size": hidden,
                "layers": layers,
                "heads": heads,
                "kv_heads": kv_heads,
                "head_size": None if head_size is None or head_size * heads == hidden else head_size,
                "mlp_size": mlp_size,
                "activation": _ACTIVATIONS[activation],
                "norm_eps": read.get("rms_norm_eps", 1e-5 if family in ("mixtral", "olmo2") else 1e-6),
                "norm_place": "after" if family in _OLMO else "before",
                "qk_norm": "rms" if normed else "none",
                "qk_norm_over": "width" if family in _OLMO else "head",
                "tie_embeddings": bool(read.get("tie_word_embeddings", False)),
                "init_std": read.get("initializer_range", 0.02) or 0.02,
                "max_positions": positions,
                "rope_theta": theta,
                "rope_scaling": scaling,
                "moe": moe,
                **_biases(read, family),
                **_windows(read, family, layers),
            }
        )
    except ValidationError as error:
        raise ModelFolderError(str(explain(error, dict(config), "config.json"))) from None
    read.refuse_rest()
    return settings
