"""Which tokenizer a source uses: one from a file, or one made from its own text and kept in the cache."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from resilin.config import Settings
from resilin.data.documents import Document, as_text, read_piece
from resilin.data.errors import Problem
from resilin.data.inputs import Inputs, plan_chunks
from resilin.data.permutation import Permutation
from resilin.data.tokenize_options import TokenizeOptions
from resilin.data.tokenizer import Tokenizer
from resilin.data.train_tokenizer import byte_tokenizer, character_tokenizer, train_bpe
from resilin.keys import hash64


class TokenizerSettings(Settings):
    """Where token ids come from."""

    path: Path | None = None
    """A tokenizer.json or a folder with one; left out, a tokenizer is made from the text."""
    kind: Literal["bpe", "bytes", "characters"] = "bpe"
    """What is made: byte-level BPE learnt from the text, one token a byte, or one a character."""
    vocab_size: Annotated[int, Field(ge=1)] = 4096
    """Entries of a learnt BPE."""
    training_bytes: Annotated[int, Field(ge=1)] = 64_000_000
    """Text a BPE or a set of characters is learnt from at most: pieces drawn from all of it."""

    def make(self, inputs: Inputs, options: TokenizeOptions, cache: Path) -> Tokenizer:
        """The tokenizer for some files, learnt once and then read from the cache."""
        if self.path is not None:
            return Tokenizer.load(self.path)
        if self.kind == "bytes":
            return byte_tokenizer()
        parts = [self.model_dump_json(), options.key, json.dumps(options.separator)]
        parts += [file.fingerprint() for file in inputs.files]
        folder = cache / f"tokenizer-{hashlib.sha256(chr(10).join(parts).encode()).hexdigest()[:16]}"
        if not (folder / "tokenizer_config.json").is_file():
            texts = training_texts(inputs, options, self.training_bytes)
            made = train_bpe(texts, self.vocab_size) if self.kind == "bpe" else character_tokenizer(texts)
            made.save(folder)
        return Tokenizer.load(folder)


def training_texts(inputs: Inputs, options: TokenizeOptions, most_bytes: int) -> Iterator[str]:
    """Texts to learn a tokenizer from: everything, or pieces drawn evenly from all files up to `most_bytes`.

    Raises:
        DataError: at the first flaw, unless `options.on_error` is "skip" (tokenising counts it then).
    """
    chunks = plan_chunks(inputs, can_cut=True, target=1 << 20)
    order = Permutation(max(1, len(chunks)), hash64("tokenizer text"))(np.arange(len(chunks))).tolist()
    given = 0
    for number in order if inputs.bytes > most_bytes else range(len(chunks)):
        for piece in chunks[number]:
            file = inputs.files[piece.file]
            for found in read_piece(file, piece, key=options.key, separator=options.separator):
                texts, problem = _texts(found, options)
                if problem is not None and options.on_error == "stop":
                    raise problem.error()
                yield from texts
                given += sum(map(len, texts))
        if given >= most_bytes:
            return


def _texts(found: object, options: TokenizeOptions) -> tuple[list[str], Problem | None]:
    if isinstance(found, Problem):
        return [], found
    if not isinstance(found, Document):
        return [], None
    if options.kind == "chat":
        messages = found.value if isinstance(found.value, list) else []
        contents = [message.get("content") for message in messages if isinstance(message, dict)]
        return [content for content in contents if isinstance(content, str)], None
    made = as_text(found, options.key)
    if isinstance(made, tuple):
        return [made[0]], None
    return [], made if isinstance(made, Problem) else None
