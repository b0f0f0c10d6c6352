"""Small texts, tokenizers and token shards."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from resilin.data.shards import TokenShards
from resilin.data.tokenizer import Tokenizer
from resilin.data.train_tokenizer import byte_tokenizer, train_bpe
from resilin.data.write_shards import write_documents

SENTENCES = [
    "The quick brown fox jumps over the lazy dog.",
    "It's a truth universally acknowledged, that 42 is 6 times 7!",
    "Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich.",
    "色は匂へど 散りぬるを 我が世誰ぞ 常ならむ",
    "def f(x):\n    return x  +  1\n\n\nclass A:\n\tpass\r\n",
    "emoji 🧬🧪 and combining e\u0301, no-break\u00a0space, thin\u2009space.",
]


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests write thousands of tiny files; none of them has to survive a power cut."""
    monkeypatch.setattr("os.fsync", lambda descriptor: None)


@pytest.fixture(scope="session")
def bpe() -> Tokenizer:
    return train_bpe(SENTENCES * 3, 400)


@pytest.fixture(scope="session")
def bytes_tokenizer() -> Tokenizer:
    return byte_tokenizer()


@pytest.fixture
def make_shards(tmp_path: Path) -> Callable[..., TokenShards]:
    """Shards of documents with the given lengths; token values count up from 1, so each place can be told."""
    count = 0

    def make(lengths: list[int], *, per_shard: int = 50, vocab_size: int = 60_000) -> TokenShards:
        nonlocal count
        count += 1
        edges = np.cumsum([0, *lengths])
        documents = [np.arange(a, b) % (vocab_size - 1) + 1 for a, b in itertools.pairwise(edges)]
        return write_documents(tmp_path / f"shards-{count}", documents, vocab_size, tokens_per_shard=per_shard)

    return make
