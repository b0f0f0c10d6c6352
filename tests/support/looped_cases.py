"""A small decoder whose blocks may be run several times."""

from __future__ import annotations

from typing import Any

from resilin.models.decoder_settings import DecoderSettings
from resilin.models.loop_settings import LoopSettings


def looped_settings(loop: LoopSettings | None, **more: Any) -> DecoderSettings:
    tree = {
        "vocab_size": 37, "hidden_size": 16, "layers": 2, "heads": 4, "kv_heads": 2, "mlp_size": 24, "init_std": 0.3,
    }  # fmt: skip
    return DecoderSettings(**{**tree, **more}, loop=loop)
