"""A tiny model and tokenizer whose behaviour can be foretold or compared exactly."""

from __future__ import annotations

import pytest
import torch
from tokenizers import Tokenizer as Inner
from tokenizers import decoders, models, pre_tokenizers

from resilin.data.tokenizer import Tokenizer
from resilin.models.decoder import Decoder
from resilin.models.decoder_settings import DecoderSettings

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def byte_tokenizer() -> Tokenizer:
    """One token for each byte (so that a character may be several tokens), and two special tokens, 256 and 257."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Inner(models.BPE({letter: index for index, letter in enumerate(alphabet)}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens(["<|endoftext|>", "<|im_end|>"])
    return Tokenizer(inner.to_str(), {"eos_token": "<|endoftext|>"})


@pytest.fixture(scope="session")
def tiny() -> Decoder:
    """A random decoder with sharp enough logits that rounding never decides an argmax."""
    settings = DecoderSettings(
        vocab_size=258, hidden_size=32, layers=2, heads=4, kv_heads=2, mlp_size=48, max_positions=64, init_std=0.4
    )
    return Decoder(settings, seed=3).eval()
