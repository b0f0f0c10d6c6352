"""Text of this machine as token shards, one token a byte: written once, and by one of several processes."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import cast

import numpy as np
from numpy.typing import NDArray

from resilin.data.shards import INDEX_FILE, TokenShards
from resilin.data.train_tokenizer import SPECIAL, byte_tokenizer
from resilin.data.write_shards import write_documents


def byte_document(values: NDArray[np.uint8]) -> NDArray[np.int64]:
    """A document's ids as `byte_tokenizer` numbers them (byte b is b + 4), and the end of the text (0)."""
    return np.append(values.astype(np.int64) + len(SPECIAL), 0)


def whole_documents(texts: Iterable[bytes], limit: int) -> Iterator[bytes]:
    """Texts up to `limit` bytes together, none of them cut (the first is taken however long it is)."""
    taken = 0
    for raw in texts:
        if taken and taken + len(raw) > limit:
            continue
        taken += len(raw)
        yield raw


def byte_shards(target: Path, documents: Iterable[NDArray[np.int64]]) -> TokenShards:
    """The token shards in a folder, written there first if it holds none; `documents` is then read once.

    They are written aside and renamed: several processes may want the same data at once.
    """
    if (target / INDEX_FILE).exists():
        return TokenShards(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f"{target.name}.", dir=target.parent))
    tokenizer = byte_tokenizer()
    # The documents are arrays of ids, which the writer takes like any sequence.
    write_documents(aside, cast(Iterable[Sequence[int]], documents), tokenizer.vocab_size, tokenizer=tokenizer)
    try:
        aside.rename(target)
    except OSError:
        shutil.rmtree(aside)
        if not (target / INDEX_FILE).exists():
            raise
    return TokenShards(target)
