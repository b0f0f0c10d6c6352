"""A tiny random Llama in both libraries, and a tokenizer with merges across words and characters of several bytes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer as Inner
from tokenizers import decoders, models, pre_tokenizers, trainers

from resilin.data.tokenizer import Tokenizer
from resilin.models.decoder import Decoder
from resilin.models.decoder_settings import DecoderSettings

TEXT = (
    "The quick brown fox jumps over the lazy dog. The dog, being lazy, sleeps on; the fox jumps again and again. "
    "Once upon a time there was a café in the città where 猫 and 犬 met. What is the answer? The answer is blue, "
    "the answer is red, the answer is that there is no answer. "
)


@dataclass(frozen=True)
class Twins:
    """The same weights in Resilin and in transformers."""

    ours: Decoder
    theirs: Any


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    inner = Inner(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=350,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator([TEXT] * 4, trainer)
    return Tokenizer(inner.to_str(), {"eos_token": "<|endoftext|>"})


@pytest.fixture(scope="session")
def twins(tokenizer: Tokenizer) -> Twins:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.3,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    theirs = transformers.LlamaForCausalLM(config).eval()
    settings = DecoderSettings(
        vocab_size=tokenizer.vocab_size,
        hidden_size=32,
        mlp_size=48,
        layers=2,
        heads=4,
        kv_heads=2,
        max_positions=64,
        norm_eps=1e-5,
    )
    ours = Decoder(settings)
    names = {
        "model.embed_tokens": "embed",
        "model.norm": "norm",
        "lm_head": "head",
        "model.layers": "blocks",
        "input_layernorm": "attention_norm",
        "post_attention_layernorm": "mlp_norm",
        "self_attn": "attention",
        "_proj": "",
    }
    state = {}
    for name, tensor in theirs.state_dict().items():
        for old, new in names.items():
            name = name.replace(old, new)
        state[name] = tensor
    ours.load_state_dict(state)
    return Twins(ours.eval(), theirs)
