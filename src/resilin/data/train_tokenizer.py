"""Making a tokenizer: byte-level BPE learnt from text, plain bytes, or the characters that occur."""

from __future__ import annotations

from collections.abc import Iterable

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, trainers

from resilin.data.errors import DataError
from resilin.data.tokenizer import END_OF_TEXT, Tokenizer

PAD = "<|pad|>"
TURN_START, TURN_END = "<|im_start|>", "<|im_end|>"
UNKNOWN = "<|unk|>"
SPECIAL = (END_OF_TEXT, PAD, TURN_START, TURN_END)
"""Every tokenizer made here has these, as ids 0 to 3: a run can go on to chat data without a new vocabulary."""

_CONFIG = {"eos_token": END_OF_TEXT, "pad_token": PAD}


def _byte_level(model: models.Model) -> tokenizers.Tokenizer:
    inner = tokenizers.Tokenizer(model)
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return inner


def _special(names: Iterable[str]) -> list[AddedToken]:
    return [AddedToken(name, special=True, normalized=False) for name in names]


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE (Sennrich et al. 2016, over bytes as in GPT-2): every text has ids, nothing is unknown.

    Args:
        texts: the training text, in any pieces.
        vocab_size: entries at most, among them 256 bytes and the special tokens; a small text gives fewer.
    """
    smallest = 256 + len(SPECIAL)
    if vocab_size < smallest:
        raise DataError(f"vocab_size {vocab_size} is below {smallest}: 256 bytes and {len(SPECIAL)} special tokens")
    inner = _byte_level(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=_special(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    inner.train_from_iterator(texts, trainer=trainer)
    return Tokenizer(inner.to_str(pretty=True), _CONFIG)


def _byte_characters() -> list[str]:
    # Byte-level tokenizers write a printable Latin-1 byte as itself and number the others from 256 upward.
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) if byte in printable else chr(256 + others.index(byte)) for byte in range(256)]


def byte_tokenizer() -> Tokenizer:
    """One token a byte: a byte-level BPE that merges nothing; byte b is token b + 4, after the special tokens."""
    vocab = {name: index for index, name in enumerate((*SPECIAL, *_byte_characters()))}
    inner = _byte_level(models.BPE(vocab=vocab, merges=[]))
    inner.add_special_tokens(_special(SPECIAL))
    return Tokenizer(inner.to_str(pretty=True), _CONFIG)


def character_tokenizer(texts: Iterable[str]) -> Tokenizer:
    """One token a character of `texts`; any other character is the unknown token."""
    characters = sorted(set().union(*map(set, texts)))
    vocab = {name: index for index, name in enumerate((*SPECIAL, UNKNOWN, *characters))}
    inner = tokenizers.Tokenizer(models.WordLevel(vocab=vocab, unk_token=UNKNOWN))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    inner.decoder = decoders.Fuse()
    inner.add_special_tokens(_special((*SPECIAL, UNKNOWN)))
    return Tokenizer(inner.to_str(pretty=True), {**_CONFIG, "unk_token": UNKNOWN})
