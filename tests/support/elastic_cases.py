"""Small elastic models of both kinds."""

from __future__ import annotations

from typing import Any

import torch
from hybrid_cases import hybrid
from nested_cases import decoder

from resilin.models.decoder import Decoder
from resilin.models.decoder_settings import DecoderSettings
from resilin.nested.elastic_model import Elastic, ElasticModel
from resilin.nouns import Batch

DENSE = DecoderSettings(
    vocab_size=37, hidden_size=16, layers=3, heads=4, kv_heads=2, mlp_size=24, init_std=0.4, max_positions=32
)
SPACES: dict[str, dict[str, Any]] = {
    "dense": {"hidden": (0.5, 1), "ffn": (0.25, 0.5, 1), "heads": (0.5, 1), "depth": (0.34, 0.67, 1)},
    "hybrid": {
        "hidden": (0.5, 1),
        "ffn": (0.5, 1),
        "heads": (0.5, 1),
        "mamba": ((0.5, 0.5), (0.5, 1), 1),
        "depth": (0.5, 0.75, 1),
    },
}
KINDS = tuple(SPACES)
TOKENS = torch.randint(37, (4, 9), generator=torch.Generator().manual_seed(1))


def whole(kind: str, **more: Any) -> Decoder:
    """In float64."""
    return hybrid(**more) if kind == "hybrid" else decoder(DENSE.model_copy(update=more))


def elastic(kind: str, decoder: Decoder | None = None, *, space: Any = None, **more: Any) -> ElasticModel:
    """Not put in order, with all axes elastic."""
    settings = Elastic.model_validate(
        {
            "model": {"use": "resilin.models.decoder_settings:DecoderSettings"},
            "ranking": "none",
            "depth_ranking": "none",
            "router_size": 8,
            "targets": (0.5, 0.75, 1),
            "space": {**SPACES[kind], **(space or {})},
            **more,
        }
    )
    decoder = whole(kind) if decoder is None else decoder
    order = (1, *(layer for layer in range(decoder.settings.layers) if layer != 1))
    return ElasticModel(decoder, settings, order, 0).double()


def batch() -> Batch:
    """Four rows."""
    labels = TOKENS.roll(-1, 1)
    labels[:, -1] = -100
    return Batch(torch.arange(4), {"tokens": TOKENS, "labels": labels})
