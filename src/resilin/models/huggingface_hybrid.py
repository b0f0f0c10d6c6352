"""Hybrid decoders from and to Hugging Face folders of the model type `nemotron_h`.

A folder has the projections of a Mamba-2 layer as one matrix, z, x, B, C and dt below each other, and its convolution
as one: these are cut into, and put together from, the matrices of `resilin.models.mamba`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from resilin.config.errors import explain
from resilin.models.huggingface_names import Part
from resilin.models.hybrid_settings import KINDS, HybridSettings, Kind
from resilin.models.weight_files import ModelFolderError

MODEL_TYPE = "nemotron_h"
_NAMES: dict[str, Kind] = {
    "mamba": "mamba",
    "linear_attention": "mamba",
    "attention": "attention",
    "full_attention": "attention",
    "mlp": "mlp",
}
_SIGNS = {kind: sign for sign, kind in KINDS.items()}
_WRITTEN = {"mamba": "linear_attention", "attention": "full_attention", "mlp": "mlp"}
_ACTIVATIONS = {"relu2": "relu2", "silu": "silu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh"}
_PLAIN = {
    "backbone.embeddings.weight": "embed.weight",
    "backbone.norm_f.weight": "norm.weight",
    "lm_head.weight": "head.weight",
}
_IN_LAYER = {
    "mamba": {name: name for name in ("A_log", "D", "dt_bias", "norm.weight")} | {"out_proj.weight": "out.weight"},
    "attention": {f"{one}_proj.weight": f"{one}.weight" for one in ("q", "k", "v", "o")},
    "mlp": {f"{one}_proj.{kind}": f"{one}.{kind}" for one in ("up", "down") for kind in ("weight", "bias")},
}
_JOINED = ("z", "x", "B", "C", "dt")
_LAYER = re.compile(r"backbone\.layers\.(\d+)\.(.+)")

# Keys that say nothing about what a model without experts and without prediction of further tokens computes.
_UNUSED = frozenset(
    {
        "mamba_ssm_cache_dtype",
        "moe_intermediate_size",
        "moe_latent_size",
        "moe_shared_expert_intermediate_size",
        "moe_shared_expert_overlap",
        "mtp_hybrid_override_pattern",
        "mtp_layers_block_type",
        "n_group",
        "n_routed_experts",
        "n_shared_experts",
        "norm_topk_prob",
        "num_experts_per_tok",
        "num_logits_to_keep",
        "rescale_prenorm_residual",
        "residual_in_fp32",
        "routed_scaling_factor",
        "time_step_floor",
        "time_step_limit",
        "topk_group",
        "use_mamba_kernels",
        "expand",
        "rope_theta",  # attention has no positions
        "rope_parameters",
        "partial_rotary_factor",
        "attention_head_dim",
    }
)
_NEUTRAL: dict[str, Any] = {
    "attention_bias": False,
    "hidden_dropout": 0.0,
    "mamba_hidden_act": "silu",
    "mamba_proj_bias": False,
    "num_nextn_predict_layers": 0,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "use_bias": False,
}


def _pattern(get: Callable[..., Any]) -> str:
    kinds, pattern = get("layers_block_type") or get("layer_types"), get("hybrid_override_pattern")
    if kinds is None:
        if pattern is None:
            raise ModelFolderError("config.json: lacks 'layers_block_type' (or 'hybrid_override_pattern')")
        return str(pattern)
    unknown = [kind for kind in kinds if kind not in _NAMES]
    if unknown:
        raise ModelFolderError(
            f"config.json: 'layers_block_type' names {unknown[0]!r}; known are {', '.join(sorted(_NAMES))} (layers of "
            "experts are not supported)"
        )
    return "".join(_SIGNS[_NAMES[kind]] for kind in kinds)


def hybrid_settings(config: Mapping[str, Any], harmless: frozenset[str]) -> HybridSettings:
    """The settings that compute what a config of this model type describes.

    Args:
        config: the content of `config.json`.
        harmless: keys that say nothing about any model.

    Raises:
        ModelFolderError: a key that would have to be ignored, by name.
    """
    taken = {"model_type", "num_hidden_layers"}

    def get(key: str, default: Any = None) -> Any:
        taken.add(key)
        value = config.get(key)
        return default if value is None else value

    def need(key: str) -> Any:
        value = get(key)
        if value is None:
            raise ModelFolderError(f"config.json: lacks {key!r}")
        return value

    activation = get("mlp_hidden_act", "relu2")
    if activation not in _ACTIVATIONS:
        raise ModelFolderError(f"config.json: 'mlp_hidden_act' is {activation!r}; known are {', '.join(_ACTIVATIONS)}")
    heads = need("num_attention_heads")
    tree = {
        "vocab_size": need("vocab_size"),
        "hidden_size": need("hidden_size"),
        "pattern": _pattern(get),
        "heads": heads,
        "kv_heads": get("num_key_value_heads", heads),
        "head_size": get("head_dim", 128),
        "mlp_size": need("intermediate_size"),
        "mlp_bias": bool(get("mlp_bias", False)),
        "activation": _ACTIVATIONS[activation],
        "norm_eps": get("layer_norm_epsilon", 1e-5),
        "max_positions": get("max_position_embeddings", 4096),
        "init_std": get("initializer_range", 0.02) or 0.02,
        "mamba": {
            "heads": need("mamba_num_heads"),
            "head_size": need("mamba_head_dim"),
            "groups": need("n_groups"),
            "state_size": need("ssm_state_size"),
            "conv_size": get("conv_kernel", 4),
            "conv_bias": bool(get("use_conv_bias", True)),
            "chunk": get("chunk_size", 128),
            "dt_min": get("time_step_min", 0.001),
            "dt_max": get("time_step_max", 0.1),
        },
    }
    try:
        settings = HybridSettings.model_validate(tree)
    except ValidationError as error:
        raise ModelFolderError(str(explain(error, dict(config), "config.json"))) from None
    for key, value in config.items():
        if key in taken or key in harmless or key in _UNUSED or key.startswith("_") or value is None:
            continue
        if key in _NEUTRAL and value == _NEUTRAL[key]:
            continue
        if key in _NEUTRAL:
            raise ModelFolderError(
                f"config.json: {key!r} is {value!r}; this decoder computes {key} = {_NEUTRAL[key]!r} only"
            )
        if key == "attention_dropout" and not value:
            continue
        raise ModelFolderError(
            f"config.json: {key!r} = {value!r} is not known for model_type {MODEL_TYPE!r}; it may change what the "
            "model computes, so it is not ignored. Remove it where it does not matter"
        )
    return settings


def hybrid_config(
    settings: HybridSettings, dtype: str = "float32", special_ids: Mapping[str, int | None] | None = None
) -> dict[str, Any]:
    """The content of `config.json`.

    Raises:
        ModelFolderError: the settings have something that this model type lacks, by name.
    """
    wrong = [
        f"{name} = {getattr(settings, name)!r}"
        for name, usual in {
            "norm": "rms",
            "gated": False,
            "qk_norm": "none",
            "qkv_bias": False,
            "out_bias": False,
            "tie_embeddings": False,
            "attention_softcap": None,
            "logit_softcap": None,
            "sizes_differ": False,
        }.items()
        if getattr(settings, name) != usual
    ]
    scale = settings.attention_scale
    if scale is not None and abs(scale * settings.head_width**0.5 - 1) > 1e-6:
        wrong.append(f"attention_scale = {scale}")
    if wrong:
        raise ModelFolderError(
            f"these settings do not fit the model type {MODEL_TYPE}: it has no {', no '.join(wrong)}"
        )
    mamba, kinds = settings.mamba, [settings.kind_of(layer) for layer in range(settings.layers)]
    names = {ours: theirs for theirs, ours in _ACTIVATIONS.items()}
    return {
        "architectures": ["NemotronHForCausalLM"],
        "model_type": MODEL_TYPE,
        "dtype": dtype,
        "vocab_size": settings.vocab_size,
        "hidden_size": settings.hidden_size,
        "layers_block_type": [_WRITTEN[kind] for kind in kinds],
        "num_attention_heads": settings.heads,
        "num_key_value_heads": settings.key_heads,
        "head_dim": settings.head_width,
        "intermediate_size": settings.feed_forward_size,
        "mlp_hidden_act": names[settings.activation],
        "mlp_bias": settings.mlp_bias,
        "layer_norm_epsilon": settings.norm_eps,
        "initializer_range": min(settings.init_std, 1.0),
        "max_position_embeddings": settings.max_positions,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mamba_num_heads": mamba.heads,
        "mamba_head_dim": mamba.head_size,
        "n_groups": mamba.groups,
        "ssm_state_size": mamba.state_size,
        "conv_kernel": mamba.conv_size,
        "use_conv_bias": mamba.conv_bias,
        "chunk_size": mamba.chunk,
        "time_step_min": mamba.dt_min,
        "time_step_max": mamba.dt_max,
        "expand": max(1, mamba.width // settings.hidden_size),
        "use_bias": False,
        "use_cache": True,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
        **(special_ids or {}),
    }


def _rows(settings: HybridSettings, layer: int) -> dict[str, int]:
    """Rows of each part of the joined projection."""
    mamba = settings.at(layer).mamba
    return dict(
        zip(_JOINED, (mamba.width, mamba.width, mamba.state_width, mamba.state_width, mamba.heads), strict=True)
    )


def hybrid_parts(settings: HybridSettings) -> Callable[[str], list[Part] | None]:
    """What each stored tensor fills, for `resilin.models.huggingface.fill_targets`."""

    def parts(name: str) -> list[Part] | None:
        name = name.replace("model.", "backbone.", 1) if name.startswith("model.") else name
        if name in _PLAIN:
            return [Part(_PLAIN[name])]
        match = _LAYER.fullmatch(name)
        if match is None or int(match[1]) >= settings.layers:
            return None
        layer, rest = int(match[1]), match[2]
        kind = settings.kind_of(layer)
        if rest == "norm.weight":
            return [Part(f"blocks.{layer}.norm.weight")]
        inner, prefix = rest.removeprefix("mixer."), f"blocks.{layer}.{kind}."
        if inner in _IN_LAYER[kind]:
            return [Part(prefix + _IN_LAYER[kind][inner])]
        stem, _, last = inner.partition(".")
        if kind == "mamba" and stem in ("in_proj", "conv1d"):
            rows = _rows(settings, layer)
            convolved = stem == "conv1d"
            names, found, at = ("x", "B", "C") if convolved else _JOINED, [], 0
            total = sum(rows[one] for one in names)
            for one in names:
                module = f"conv_{one}" if convolved else one
                found.append(Part(f"{prefix}{module}.{last}", rows=(at, total)))
                at += rows[one]
            return found
        return None

    return parts


def hybrid_tensors(model: nn.Module, settings: HybridSettings) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a hybrid decoder under the name that the model type stores it by."""
    own = {name: parameter.detach() for name, parameter in model.named_parameters()}
    for theirs, ours in _PLAIN.items():
        if ours in own:
            yield theirs, own[ours]
    for layer in range(settings.layers):
        kind = settings.kind_of(layer)
        prefix, stored = f"blocks.{layer}.{kind}.", f"backbone.layers.{layer}."
        yield f"{stored}norm.weight", own[f"blocks.{layer}.norm.weight"]
        for theirs, ours in _IN_LAYER[kind].items():
            if prefix + ours in own:
                yield f"{stored}mixer.{theirs}", own[prefix + ours]
        if kind == "mamba":
            yield f"{stored}mixer.in_proj.weight", torch.cat([own[f"{prefix}{one}.weight"] for one in _JOINED])
            for last in ("weight", "bias"):
                if f"{prefix}conv_x.{last}" in own:
                    joined = torch.cat([own[f"{prefix}conv_{one}.{last}"] for one in ("x", "B", "C")])
                    yield f"{stored}mixer.conv1d.{last}", joined
