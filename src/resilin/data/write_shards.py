"""Writing shard folders: each file under a temporary name, synced, renamed; the index last."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from resilin.data.errors import DataError
from resilin.data.shards import (
    FORMAT,
    INDEX_FILE,
    VERSION,
    Shard,
    TokenShards,
    contents_digest,
    numpy_dtype,
    token_dtype,
)
from resilin.data.tokenizer import Tokenizer


def write_atomically(file: Path, contents: bytes | memoryview) -> None:
    """Write a file so that a reader, or a run after a crash, sees all of it or nothing."""
    temporary = file.with_name(f"{file.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as stream:
            stream.write(contents)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(file)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise DataError(f"{file}: could not be written: {error.strerror or error}") from None


def write_shard(
    folder: Path,
    name: str,
    tokens: bytes | bytearray,
    starts: Sequence[int],
    *,
    dtype: str,
    text_bytes: int,
    units: bytes | bytearray | None = None,
) -> Shard:
    """Write one shard's files.

    Args:
        folder: an existing folder.
        name: the shard's name.
        tokens: its ids, already as little-endian bytes of `dtype`.
        starts: where documents start, in tokens.
        dtype: "uint16" or "uint32".
        text_bytes: bytes of text the tokens stand for.
        units: one byte a token, 1 where it is to be learnt; None where every token is.
    """
    parts: dict[str, bytes | bytearray] = {
        "tokens": tokens,
        "starts": np.asarray(starts, dtype="<u8").tobytes(),
    }
    if units is not None:
        parts["units"] = units
    for part, contents in parts.items():
        write_atomically(folder / f"{name}.{part}", memoryview(contents))
    sums = {part: hashlib.sha256(contents).hexdigest() for part, contents in parts.items()}
    return Shard(name, len(tokens) // numpy_dtype(dtype).itemsize, len(starts), text_bytes, sums)


def write_index(
    folder: Path,
    shards: Sequence[Shard],
    *,
    dtype: str,
    vocab_size: int,
    tokenizer: Tokenizer | None,
    record: Mapping[str, Any],
) -> TokenShards:
    """Write the tokenizer's files and, last, the index; returns the folder opened.

    Args:
        folder: holds the shards' files.
        shards: in stream order.
        dtype: the stored type.
        vocab_size: every id is below it.
        tokenizer: what made the tokens, if known.
        record: what else to remember: sources, settings, counts of what was skipped.
    """
    index: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        "dtype": dtype,
        "vocab_size": vocab_size,
        "tokens": sum(shard.tokens for shard in shards),
        "documents": sum(shard.documents for shard in shards),
        "text_bytes": sum(shard.text_bytes for shard in shards),
        "tokenizer": None if tokenizer is None else {"sha256": tokenizer.digest, "eos_id": tokenizer.eos_id},
        **record,
        "shards": [shard.as_json() for shard in shards],
    }
    if tokenizer is not None:
        for name, text in tokenizer.files().items():
            write_atomically(folder / name, text.encode())
    index["digest"] = contents_digest(dtype, vocab_size, shards)
    write_atomically(folder / INDEX_FILE, (json.dumps(index, indent=1, ensure_ascii=False) + "\n").encode())
    return TokenShards(folder)


def write_documents(
    folder: Path,
    documents: Iterable[Sequence[int]],
    vocab_size: int,
    *,
    tokenizer: Tokenizer | None = None,
    tokens_per_shard: int = 2**24,
) -> TokenShards:
    """Write documents that are already token ids, as they are (no end token is added).

    Raises:
        DataError: for an id outside the vocabulary, naming the document.
    """
    folder.mkdir(parents=True, exist_ok=True)
    dtype = token_dtype(vocab_size)
    shards: list[Shard] = []
    tokens = bytearray()
    starts: list[int] = []
    width = numpy_dtype(dtype).itemsize

    def flush() -> None:
        nonlocal tokens, starts
        name = f"shard-{len(shards):05d}"
        shards.append(write_shard(folder, name, tokens, starts, dtype=dtype, text_bytes=0))
        tokens, starts = bytearray(), []

    for number, document in enumerate(documents):
        ids = np.asarray(document, dtype=np.int64)
        if ids.size and (int(ids.min()) < 0 or int(ids.max()) >= vocab_size):
            bad = int(ids[np.argmax((ids < 0) | (ids >= vocab_size))])
            raise DataError(f"document {number}: token id {bad} is not in [0, {vocab_size})")
        if len(tokens) // width >= tokens_per_shard:
            flush()
        if ids.size:
            starts.append(len(tokens) // width)
            tokens += ids.astype(numpy_dtype(dtype)).tobytes()
    flush()
    return write_index(folder, shards, dtype=dtype, vocab_size=vocab_size, tokenizer=tokenizer, record={})
