"""Small decoders of chains."""

from __future__ import annotations

import torch

from resilin.models.decoder import Decoder
from resilin.models.decoder_settings import DecoderSettings


def chain_settings(sizes=(2, 2, 4), share_keys=False, **more) -> DecoderSettings:
    """Chains of these numbers of query heads; two key heads to four query heads."""
    heads = sum(sizes)
    tree = {
        "vocab_size": 37,
        "hidden_size": 4 * heads,
        "layers": 2,
        "heads": heads,
        "kv_heads": 2 if share_keys else heads // 2,
        "mlp_size": 6 * heads,
        "max_positions": 64,
        "init_std": 0.2,
        "chains": {"sizes": sizes, "share_keys": share_keys},
    }
    return DecoderSettings.model_validate(tree | more)


def chain_decoder(chosen: DecoderSettings, dtype=torch.float64, seed: int = 3) -> Decoder:
    return Decoder(chosen, seed=seed).to(dtype)
