"""A `config.json` of our own, for decoders that no Hugging Face family describes: those whose blocks differ in size,
are looped or have chains, whose experts have offsets or are weighted by sigmoids (unless as in GLM-4's mixtures), and
hybrids whose head is tied.

    {"model_type": "resilin", "architectures": ["ResilinDecoder"], "dtype": "float32",
     "settings": {...},                        a decoder's settings as in a run's [model], without what is usual
     "bos_token_id": ..., "eos_token_id": ..., "pad_token_id": ...}

The weights beside it are safetensors named as in a Llama folder (experts as in Qwen's; of looped decoders also
`model.loop.*` and `model.layers.*.modulation.*`; of chains one tensor for each, `...q_proj.chains.0.weight`), or as in
a Nemotron-H folder where the settings have a `pattern`. `transformers` does not know the model type; `resilin` commands
and `open_model` open the folder like any other.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from resilin.config.errors import explain
from resilin.models.decoder_settings import DecoderSettings
from resilin.models.huggingface_families import fits
from resilin.models.hybrid_settings import HybridSettings
from resilin.models.weight_files import ModelFolderError

MODEL_TYPE = "resilin"


def has_own_config(settings: DecoderSettings) -> bool:
    """Whether no family describes such a decoder: it has blocks of different sizes, loops, chains, offsets of experts
    or weights of theirs by sigmoids other than in GLM-4's mixtures, or is a hybrid with a tied head.
    """
    tied_hybrid = isinstance(settings, HybridSettings) and settings.tie_embeddings
    moe = settings.moe
    offsets = moe is not None and (moe.router_bias or moe.balance == "bias" or moe.routing == "sigmoid_topk")
    offsets = offsets and not fits(settings, "glm4_moe")
    return settings.sizes_differ or settings.loop is not None or settings.chains is not None or tied_hybrid or offsets


def own_config(settings: DecoderSettings, dtype: str, special_ids: Mapping[str, int | None] | None) -> dict[str, Any]:
    """The content of `config.json`."""
    tree = settings.model_dump(mode="json", exclude_defaults=True)
    if isinstance(settings, HybridSettings):
        tree["pattern"] = settings.pattern
    return {
        "architectures": ["ResilinDecoder"],
        "model_type": MODEL_TYPE,
        "dtype": dtype,
        "settings": tree,
        **(special_ids or {}),
    }


def own_settings(config: Mapping[str, Any]) -> DecoderSettings:
    """The settings that `own_config` told.

    Raises:
        ModelFolderError: there are none, or they are no decoder's.
    """
    tree = config.get("settings")
    if not isinstance(tree, dict):
        raise ModelFolderError(
            f"config.json: model_type {MODEL_TYPE!r} needs a table 'settings' with a decoder's settings"
        )
    try:
        found = (HybridSettings if "pattern" in tree else DecoderSettings).model_validate(tree)
    except ValidationError as error:
        raise ModelFolderError(str(explain(error, tree, "config.json, settings"))) from None
    if not found.vocab_size:
        raise ModelFolderError("config.json: settings lack 'vocab_size'")
    return found
