"""Text to token ids and back, through the `tokenizers` library; saved so that `transformers` opens it too."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tokenizers
from tokenizers.decoders import DecodeStream

from resilin.data.errors import DataError

if TYPE_CHECKING:
    from torch import Tensor

    from resilin.data.chat import ChatTokens, Message

TOKENIZER_FILE = "tokenizer.json"
CONFIG_FILE = "tokenizer_config.json"
TEMPLATE_FILE = "chat_template.jinja"
END_OF_TEXT = "<|endoftext|>"
_END_NAMES = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "<|im_end|>")


def _name(value: object) -> str | None:
    """A special token in a tokenizer_config.json: its text, or a table that holds it."""
    if isinstance(value, Mapping):
        value = value.get("content")
    return value if isinstance(value, str) else None


def _read(tokenizer_json: str) -> tokenizers.Tokenizer:
    try:
        inner = tokenizers.Tokenizer.from_str(tokenizer_json)
    except Exception as error:  # the library raises plain Exception for any broken file
        raise DataError(f"not a tokenizer.json that the tokenizers library can read: {error}") from None
    # A stored file may ask for padding or truncation, which would lose or invent tokens.
    inner.no_padding()
    inner.no_truncation()
    return inner


class StreamDecoder:
    """Token ids in, text out, piece by piece; never half a character."""

    def __init__(self, tokenizer: Tokenizer, *, skip_special: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._stream = DecodeStream(skip_special_tokens=skip_special)
        self._ids: list[int] = []
        self._given = 0

    def step(self, token: int) -> str:
        """The text that has become certain with this token; "" while a character is incomplete."""
        self._ids.append(token)
        text: str = self._stream.step(self._tokenizer.inner, token) or ""
        self._given += len(text)
        return text

    def finish(self) -> str:
        """What was still held back (an incomplete character decodes to the replacement character)."""
        rest = self._tokenizer.decode(self._ids, skip_special=self._skip_special)[self._given :]
        self._given += len(rest)
        return rest


class Tokenizer:
    """A `tokenizers.Tokenizer` with its special tokens, chat template and files.

    Attributes:
        inner: the wrapped tokenizer.
        eos_id: the token that ends a document, or None.
        bos_id: the token that begins one, or None.
        pad_id: the token that fills rows, or None.
        chat_template: the tokenizer's own Jinja template, or None for ChatML.
    """

    def __init__(self, tokenizer_json: str, config: Mapping[str, Any] | None = None) -> None:
        self.inner = _read(tokenizer_json)
        self._json = tokenizer_json
        self.config = dict(config or {})
        self.eos_id = self._special("eos_token", _END_NAMES)
        self.bos_id = self._special("bos_token", ())
        self.pad_id = self._special("pad_token", ("<|pad|>", "<pad>"))
        template = self.config.get("chat_template")
        if isinstance(template, list):  # named templates: the one called "default" is the conversation's
            template = next((item.get("template") for item in template if item.get("name") == "default"), None)
        self.chat_template: str | None = template if isinstance(template, str) else None

    def _special(self, key: str, fallbacks: Sequence[str]) -> int | None:
        named = _name(self.config.get(key))
        for name in [named] if named is not None else fallbacks:
            token = self.inner.token_to_id(name)
            if token is not None:
                return int(token)
        return None

    @cached_property
    def vocab_size(self) -> int:
        """One more than the largest id."""
        return max(self.inner.get_vocab(with_added_tokens=True).values()) + 1

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the tokenizer's file: equal digests give equal ids."""
        return hashlib.sha256(self._json.encode()).hexdigest()

    @property
    def json(self) -> str:
        """The text of its tokenizer.json."""
        return self._json

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """Ids of tokens that stand for no text."""
        added = self.inner.get_added_tokens_decoder()
        return frozenset(token for token, description in added.items() if description.special)

    @cached_property
    def plain(self) -> tokenizers.Tokenizer:
        """The same tokenizer, for which the text of a special token is only text."""
        inner = _read(self._json)
        inner.encode_special_tokens = True
        return inner

    def encode(self, text: str, *, parse_special: bool = True) -> list[int]:
        """Token ids of a text, without added begin or end tokens.

        Args:
            text: any text.
            parse_special: read the text of a special token as that token (as `transformers` does); False keeps it
                plain text, so that a document cannot forge an end of text.
        """
        return self.encode_batch([text], parse_special=parse_special)[0]

    def encode_batch(self, texts: Sequence[str], *, parse_special: bool = True) -> list[list[int]]:
        """Token ids of several texts."""
        inner = self.inner if parse_special else self.plain
        return [list(item.ids) for item in inner.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """The text of token ids; special tokens are left out unless asked for."""
        return self.inner.decode(list(ids), skip_special_tokens=skip_special)

    def stream_decoder(self, *, skip_special: bool = True) -> StreamDecoder:
        """A decoder for tokens that arrive one by one."""
        return StreamDecoder(self, skip_special=skip_special)

    @cached_property
    def byte_lengths(self) -> Tensor:
        """(V,) int64: how many bytes of text each token stands for; 0 for special tokens and unused ids."""
        import torch

        lengths = torch.zeros(self.vocab_size, dtype=torch.int64)
        decoder = json.loads(self._json).get("decoder") or {}
        byte_level = '"ByteLevel"' in json.dumps(decoder)
        added = self.inner.get_added_tokens_decoder()
        for token, index in self.inner.get_vocab(with_added_tokens=True).items():
            if index in self.special_ids:
                continue
            if index in added:
                lengths[index] = len(token.encode())
            elif byte_level:  # each character of a byte-level token is one byte
                lengths[index] = len(token)
            elif len(token) == 6 and token.startswith("<0x") and token.endswith(">"):  # byte fallback
                lengths[index] = 1
            else:
                lengths[index] = len(token.replace("\u2581", " ").encode())  # the sentencepiece sign for a space
        return lengths

    def chat(self, messages: Sequence[Message], *, add_generation_prompt: bool = False) -> ChatTokens:
        """A conversation as ids and the mask of what the assistant wrote (see `resilin.data.chat`)."""
        from resilin.data.chat import encode_chat

        return encode_chat(self, messages, add_generation_prompt=add_generation_prompt)

    def files(self) -> dict[str, str]:
        """The files `save` writes, by name."""
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": 10**30,
            "clean_up_tokenization_spaces": False,
            **self.config,
        }
        for key, token in (("eos_token", self.eos_id), ("bos_token", self.bos_id), ("pad_token", self.pad_id)):
            if token is not None and key not in config:
                config[key] = self.inner.id_to_token(token)
        return {TOKENIZER_FILE: self._json, CONFIG_FILE: json.dumps(config, indent=2, ensure_ascii=False) + "\n"}

    def save(self, folder: Path) -> None:
        """Write tokenizer.json and tokenizer_config.json, as `transformers.AutoTokenizer` reads them."""
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in self.files().items():
            (folder / name).write_text(text, encoding="utf-8")

    @staticmethod
    def load(path: Path | str) -> Tokenizer:
        """A tokenizer from a folder that holds a tokenizer.json, or from the file itself.

        Raises:
            DataError: naming the file that is missing or cannot be read.
        """
        path = Path(path)
        file = path / TOKENIZER_FILE if path.is_dir() else path
        if not file.is_file():
            inside = f"{path} has no {TOKENIZER_FILE}" if path.is_dir() else f"{path}: no such file"
            raise DataError(f"{inside}; give a tokenizer.json or a folder that holds one")
        config: dict[str, Any] = {}
        try:
            text = file.read_text(encoding="utf-8")
            config_file = file.parent / CONFIG_FILE
            if config_file.is_file():
                config = json.loads(config_file.read_text(encoding="utf-8"))
            template_file = file.parent / TEMPLATE_FILE
            if template_file.is_file():
                config["chat_template"] = template_file.read_text(encoding="utf-8")
        except (UnicodeDecodeError, json.JSONDecodeError) as error:
            raise DataError(f"{file.parent}: a tokenizer file is not valid UTF-8 JSON: {error}") from None
        try:
            return Tokenizer(text, config)
        except DataError as error:
            raise DataError(f"{file}: {error}") from None
