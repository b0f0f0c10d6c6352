"""Tiny decoders in float64 and made pairs: exact properties want exact numbers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from resilin.models.decoder import Decoder
from resilin.models.decoder_settings import DecoderSettings
from resilin.models.settings import ModelContext
from resilin.nouns import Batch

VOCABULARY = 17


def build_tiny(seed: int = 0, dtype: torch.dtype = torch.float64, **changes: Any) -> Decoder:
    settings = {"vocab_size": VOCABULARY, "hidden_size": 16, "layers": 2, "heads": 2, "mlp_size": 24, "init_std": 0.3}
    return DecoderSettings(**{**settings, **changes}).build(ModelContext(seed, None)).to(dtype)


def build_pairs(lengths: Sequence[tuple[int, int]], prompt: int = 3, seed: int = 0, width: int | None = None) -> Batch:
    """Pairs with answers of the given lengths (chosen, rejected) after prompts of random tokens."""
    generator = torch.Generator().manual_seed(seed)
    width = width or prompt + max(max(pair) for pair in lengths)
    fields = {}
    start = torch.randint(VOCABULARY, (len(lengths), prompt), generator=generator)
    for side, name in enumerate(("chosen", "rejected")):
        tokens = torch.zeros(len(lengths), width, dtype=torch.int64)
        labels = torch.full((len(lengths), width), -100)
        for row, pair in enumerate(lengths):
            text = torch.cat([start[row], torch.randint(VOCABULARY, (pair[side],), generator=generator)])
            tokens[row, : len(text) - 1] = text[:-1]
            labels[row, prompt - 1 : len(text) - 1] = text[prompt:]
        fields[f"{name}_tokens"], fields[f"{name}_labels"] = tokens, labels
    fields["pair"] = torch.arange(len(lengths))
    return Batch(torch.arange(len(lengths)), fields)


@pytest.fixture
def tiny() -> Callable[..., Decoder]:
    torch.set_num_threads(1)
    return build_tiny


@pytest.fixture
def pairs() -> Callable[..., Batch]:
    return build_pairs
