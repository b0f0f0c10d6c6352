"""The tokenizer inside a GGUF file, so that the file can be opened alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from resilin.models.gguf_file import open_gguf
from resilin.models.weight_files import ModelFolderError

# Token types of llama.cpp.
_CONTROL, _USER_DEFINED = 3, 4

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_SIGNS_AND_SPACES = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


@dataclass(frozen=True, slots=True)
class GGUFTokenizer:
    """A tokenizer and what belongs to it.

    Attributes:
        tokenizer: byte-level BPE; `tokenizer.save(path)` writes a tokenizer.json.
        bos_id: first token of a text, or None.
        eos_id: token that ends a text, or None.
        pad_id: padding, or None.
        add_bos: whether texts begin with `bos_id`.
        chat_template: the Jinja text, or None.
    """

    tokenizer: Tokenizer
    bos_id: int | None
    eos_id: int | None
    pad_id: int | None
    add_bos: bool
    chat_template: str | None


def _pre_tokenizer(kind: str) -> pre_tokenizers.PreTokenizer:
    """How text is cut before merging, by llama.cpp's name for it."""
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if kind in ("gpt-2", "default"):
        return byte_level
    if kind == "smollm":
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
    numbers = {"qwen2": r"\p{N}", "llama-bpe": r"\p{N}{1,3}"}.get(kind)
    if numbers is None:
        raise ModelFolderError(
            f"tokenizer.ggml.pre {kind!r} is not one of gpt-2, default, smollm, qwen2, llama-bpe; use the model's own "
            "tokenizer.json"
        )
    pattern = "|".join((_CONTRACTIONS, _WORDS, numbers, _SIGNS_AND_SPACES))
    split = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def tokenizer_from_metadata(metadata: Mapping[str, Any]) -> GGUFTokenizer:
    """The tokenizer that GGUF metadata describe.

    Raises:
        ModelFolderError: not byte-level BPE (SentencePiece, say), or cut in a way not known here.
    """
    kind = metadata.get("tokenizer.ggml.model")
    if kind != "gpt2":
        raise ModelFolderError(
            f"tokenizer.ggml.model is {kind!r}; byte-level BPE ('gpt2') can be read. Use the model's own tokenizer.json"
        )
    tokens: list[str] = metadata["tokenizer.ggml.tokens"]
    merges = [tuple(pair.split(" ", 1)) for pair in metadata["tokenizer.ggml.merges"]]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    name = metadata.get("tokenizer.ggml.pre", "default")
    tokenizer.pre_tokenizer = _pre_tokenizer(name)
    if name == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    types = metadata.get("tokenizer.ggml.token_type", [])
    for wanted, special in ((_CONTROL, True), (_USER_DEFINED, False)):
        added = [AddedToken(t, special=special, normalized=False) for t, k in zip(tokens, types) if k == wanted]  # noqa: B905
        if special:
            tokenizer.add_special_tokens(added)
        else:
            tokenizer.add_tokens(added)
    return GGUFTokenizer(
        tokenizer,
        metadata.get("tokenizer.ggml.bos_token_id"),
        metadata.get("tokenizer.ggml.eos_token_id"),
        metadata.get("tokenizer.ggml.padding_token_id"),
        bool(metadata.get("tokenizer.ggml.add_bos_token", False)),
        metadata.get("tokenizer.chat_template"),
    )


def load_gguf_tokenizer(path: Path | str) -> GGUFTokenizer:
    """The tokenizer inside a GGUF file."""
    file = open_gguf(path)
    try:
        return tokenizer_from_metadata(file.metadata)
    except ModelFolderError as error:
        raise ModelFolderError(f"{file.path}: {error}") from None
