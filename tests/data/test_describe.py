"""What a data set is said to hold is what was put there, repeated text among it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from resilin.data.describe import describe, describe_text, is_data_set
from resilin.data.duplicates import duplicate_rate, passage_hashes
from resilin.data.inputs import find_inputs
from resilin.data.tokenize import tokenize_files
from resilin.data.tokenize_options import TokenizeOptions
from resilin.data.tokenizer import Tokenizer
from resilin.data.write_shards import write_documents


def random_documents(count: int, length: int, seed: int = 0) -> list[np.ndarray]:
    draw = np.random.default_rng(seed)
    return [draw.integers(1, 5000, length) for _ in range(count)]


@pytest.mark.parametrize("copies", [0, 10, 50])
def test_planted_copies_give_their_rate(copies: int, tmp_path: Path) -> None:
    unique = random_documents(100, 400)
    shards = write_documents(tmp_path, unique + unique[:copies], 5000, tokens_per_shard=7000)
    found = duplicate_rate(shards)
    assert found.rate == pytest.approx(copies / (100 + copies), abs=0.02)
    assert found.documents == copies


def test_a_passage_is_found_wherever_it_stands_and_a_common_phrase_is_not(tmp_path: Path) -> None:
    passage = random_documents(1, 64, seed=999)[0]
    documents = [np.concatenate([random_documents(1, 100 + i, seed=i)[0], passage]) for i in range(50)]
    shards = write_documents(tmp_path / "a", documents, 5000)
    hashes = passage_hashes(np.concatenate(documents), 32)
    repeated = 1 - len(np.unique(hashes)) / len(hashes)
    assert duplicate_rate(shards).rate == pytest.approx(repeated, abs=1e-3)
    assert repeated == pytest.approx(49 * 33 / len(hashes), rel=0.02)
    phrases = [np.concatenate([random_documents(1, 100, seed=i)[0], passage[:20]]) for i in range(50)]
    assert duplicate_rate(write_documents(tmp_path / "b", phrases, 5000)).rate == 0.0


def test_equal_hashes_mean_equal_passages_and_sampling_keeps_the_rate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = np.random.default_rng(1).integers(0, 2, 3000)  # two values: many short repeats
    hashes = passage_hashes(tokens, 8)
    windows = np.lib.stride_tricks.sliding_window_view(tokens, 8)
    assert len(np.unique(hashes)) == len(np.unique(windows, axis=0))
    assert len(passage_hashes(tokens[:5], 8)) == 0
    unique = random_documents(200, 400)
    shards = write_documents(tmp_path, unique + unique[:50], 5000)
    monkeypatch.setattr("resilin.data.duplicates._SAMPLE", 10_000)
    assert duplicate_rate(shards).rate == pytest.approx(0.2, abs=0.03)


def test_shards_are_described_by_their_numbers(tmp_path: Path, bpe: Tokenizer) -> None:
    for number in range(40):
        (tmp_path / f"{number:02d}.txt").write_text("word " * (number + 1))
    shards, _ = tokenize_files(find_inputs([tmp_path]), tmp_path / "out", bpe, TokenizeOptions())
    described = describe(tmp_path / "out")
    lengths = [len(bpe.encode("word " * (number + 1))) + 1 for number in range(40)]
    assert (described["tokens"], described["documents"]) == (sum(lengths), 40)
    assert (described["longest_document"], described["median_document"]) == (max(lengths), np.median(lengths))
    assert described["bytes_per_token"] == sum(5 * (n + 1) for n in range(40)) / sum(lengths)
    assert sum(described["splits"].values()) == shards.token_count
    text = describe_text(described)
    assert f"{shards.token_count:,} (uint16" in text
    assert "validation" in text


def test_files_are_described_with_what_is_wrong_in_them(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "one"}\n{"text": 2}\n\n{"text": "three"}\n{')
    described = describe(file)
    assert (described["documents"], described["blank"], described["text_bytes"]) == (2, 1, 8)
    assert described["problems"] == {"wrong type": 1, "broken JSON": 1}
    assert "line 2" in describe_text(described)
    assert is_data_set(file)
    assert not is_data_set(tmp_path / "run.toml")
