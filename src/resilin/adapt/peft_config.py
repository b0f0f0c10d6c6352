"""`adapter_config.json` as PEFT writes and reads it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from resilin.adapt.settings import LOW_RANK, AdapterSettings, Bias
from resilin.adapt.targets import AdapterError

CONFIG_FILE = "adapter_config.json"
_VARIANTS = {"miss": True, "bat_col": "bat", "mini": "mini"}
_NOT_HERE = (
    "alpha_pattern",
    "alora_invocation_tokens",
    "arrow_config",
    "fan_in_fan_out",
    "kasa_config",
    "layer_replication",
    "lora_bias",
    "megatron_config",
    "monteclora_config",
    "rank_pattern",
    "target_parameters",
    "trainable_token_indices",
    "use_bdlora",
    "use_qalora",
    "velora_config",
)
"""What else PEFT's LoRA can do, and adapters here cannot."""
_CHANGES_BASE = ("corda", "loftq", "lora_ga", "olora", "pissa")
"""Initial values that also change the base, so that the folder alone is not the adapter."""


def config_of(settings: AdapterSettings, where: Mapping[str, Any], *, base: str | None, causal: bool) -> dict[str, Any]:
    """The configuration for a PEFT folder.

    Args:
        settings: of the adapter.
        where: target_modules, exclude_modules, layers_to_transform and modules_to_save in the base's own names.
        base: what PEFT should load underneath: a folder or a hub name.
        causal: whether the base is a language model.

    Raises:
        AdapterError: PEFT has no such method.
    """
    common = {
        "base_model_name_or_path": base,
        "task_type": "CAUSAL_LM" if causal else None,
        "inference_mode": True,
        "r": settings.rank,
        **where,
    }
    if settings.method in LOW_RANK:
        return {
            "peft_type": "LORA",
            **common,
            "lora_alpha": settings.rank if settings.alpha is None else settings.alpha,
            "lora_dropout": settings.dropout,
            "use_rslora": settings.method == "rslora",
            "use_dora": settings.method == "dora",
            "init_lora_weights": True,
            "fan_in_fan_out": False,
            "bias": "lora_only" if settings.bias == "only" else settings.bias,
        }
    if settings.method not in _VARIANTS:
        raise AdapterError(
            f"PEFT has no {settings.method}: of the block methods it knows miss, bat_col and mini; export the merged "
            "model instead"
        )
    return {
        "peft_type": "MISS",
        **common,
        "miss_dropout": settings.dropout,
        "mini_r": settings.mini_rank or 1,
        "init_weights": _VARIANTS[settings.method],
        "bias": "MiSS_only" if settings.bias == "only" else settings.bias,
    }


def _given(config: Mapping[str, Any], key: str, kind: type | tuple[type, ...], default: Any, path: str) -> Any:
    value = config.get(key, default)
    if value is not default and (not isinstance(value, kind) or (isinstance(value, bool) and kind is int)):
        raise AdapterError(f"{path}: {key} is {value!r}, which is not what PEFT writes there")
    return value


def _bias(value: Any, path: str) -> Bias:
    if value in ("none", "all"):
        return value  # type: ignore[no-any-return]
    if isinstance(value, str) and value.endswith("_only"):
        return "only"
    raise AdapterError(f"{path}: bias is {value!r}; expected none, all or ..._only")


def _lora(config: Mapping[str, Any], path: str) -> dict[str, Any]:
    for key in _NOT_HERE:
        if config.get(key):
            raise AdapterError(f"{path}: uses PEFT's {key} ({config[key]!r}), which adapters here do not have")
    start = str(config.get("init_lora_weights", "")).lower()
    if start.startswith(_CHANGES_BASE):
        raise AdapterError(
            f"{path}: init_lora_weights is {start!r}, which changes the base model too: convert it with PEFT's "
            "save_pretrained(..., path_initial_model_for_weight_conversion=...)"
        )
    rslora, dora = bool(config.get("use_rslora")), bool(config.get("use_dora"))
    rank = _given(config, "r", int, 8, path)
    alpha = float(_given(config, "lora_alpha", (int, float), 8, path))
    if rslora and dora:
        alpha *= rank**0.5  # PEFT's scale of both together
    return {
        "method": "dora" if dora else "rslora" if rslora else "lora",
        "rank": rank,
        "alpha": alpha,
        "dropout": _given(config, "lora_dropout", (int, float), 0.0, path),
    }


def _miss(config: Mapping[str, Any], path: str, prefix: str) -> dict[str, Any]:
    variant = config.get("init_weights", True)
    methods: dict[Any, str] = {True: "miss", False: "miss", "bat": "bat_col", "mini": "mini"}
    if not isinstance(variant, bool | str) or variant not in methods:
        raise AdapterError(f"{path}: init_weights is {variant!r}; expected true, false, 'bat' or 'mini'")
    method = methods[variant]
    dropout = _given(config, f"{prefix}_dropout", (int, float), 0.0, path)
    return {
        "method": method,
        "rank": _given(config, "r", int, 64, path),
        "mini_rank": _given(config, "mini_r", int, 1, path) if method == "mini" else None,
        "dropout": 0.0 if method == "bat_col" else dropout,  # PEFT's bat takes no notice of it either
    }


_READERS: dict[str, Callable[[Mapping[str, Any], str], dict[str, Any]]] = {
    "LORA": _lora,
    "MISS": lambda config, path: _miss(config, path, "miss"),
    "BONE": lambda config, path: _miss(config, path, "bone"),
}


def settings_of(config: Mapping[str, Any], path: str) -> AdapterSettings:
    """The settings of an adapter in a PEFT folder, except for where it goes: its tensors say that.

    Args:
        config: of the file.
        path: of the file, for messages.

    Raises:
        AdapterError: a method or an option that is not known here, by name.
    """
    kind = config.get("peft_type")
    if kind not in _READERS:
        raise AdapterError(f"{path}: peft_type is {kind!r}; read here are {', '.join(_READERS)}")
    own = _READERS[str(kind)](config, path)
    modules = config.get("modules_to_save") or ()
    return AdapterSettings.model_validate(
        {**own, "bias": _bias(config.get("bias", "none"), path), "modules_to_save": tuple(modules)}
    )
