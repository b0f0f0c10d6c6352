"""What tells one frozen model from another: digests of its tensors' values, in whatever format they are stored."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping

import torch
from torch import Tensor

from resilin.models.decoder_settings import DecoderSettings

_NO_NUMBERS = (
    "attention_backend",
    "dropout",
    "init",
    "init_std",
    "layer_sizes",
    "max_positions",
    "mlp_tiles",
    "moe",
    "mup_base_size",
    "offload",
    "recompute",
    "zero_query_init",
)
"""Settings that say nothing of what the frozen parts compute."""


def tensor_digest(tensor: Tensor) -> str:
    """Of a tensor's shape and values in float32: the same however wide it is stored, if that loses nothing."""
    values = tensor.detach().to(device="cpu", dtype=torch.float32).contiguous()
    digest = hashlib.blake2b(str(tuple(values.shape)).encode(), digest_size=16)
    digest.update(values.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def table_digest(table: Mapping[str, str], settings: DecoderSettings | None = None) -> str:
    """One digest of many, by name; with settings, of what the model computes with them too."""
    about = {} if settings is None else told_of(settings)
    text = json.dumps([dict(sorted(table.items())), about], sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def told_of(settings: DecoderSettings) -> dict[str, object]:
    """The settings that decide what a decoder's frozen parts compute, sizes written out."""
    tree = settings.model_dump(mode="json", exclude=set(_NO_NUMBERS))
    size = settings.feed_forward_size if settings.moe is None else settings.moe.expert_size
    return tree | {"kv_heads": settings.key_heads, "head_size": settings.head_width, "mlp_size": size}
