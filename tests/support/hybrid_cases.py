"""Small hybrid decoders."""

from __future__ import annotations

from typing import Any

import torch

from resilin.models.hybrid import HybridDecoder
from resilin.models.hybrid_settings import HybridSettings

MAMBA = {"heads": 4, "head_size": 6, "groups": 2, "state_size": 5, "chunk": 4}
SIZES: dict[str, Any] = {
    "vocab_size": 37,
    "hidden_size": 16,
    "pattern": "M-*M",
    "heads": 4,
    "kv_heads": 2,
    "mlp_size": 24,
    "mamba": MAMBA,
    "init_std": 0.3,
    "max_positions": 32,
}


def hybrid_settings(**more: Any) -> HybridSettings:
    """Of a decoder with every kind of layer."""
    return HybridSettings.model_validate({**SIZES, **more, "mamba": {**MAMBA, **more.get("mamba", {})}})


def hybrid(dtype: torch.dtype = torch.float64, **more: Any) -> HybridDecoder:
    """With weights whose norms and biases are not those of a new model."""
    model = HybridDecoder(hybrid_settings(**more), seed=3).to(dtype)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator, dtype=dtype)
    return model
