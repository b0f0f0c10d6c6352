from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from resilin.data.settings import SourceContext
from resilin.evaluate.bigram import STRENGTHS, Bigram, pairs_of
from resilin.nouns import Batch
from resilin.recipes.standard_library import StandardLibrary


class Rows:
    """A source of fixed rows, one batch each."""

    def __init__(self, *rows: list[int], padding: int = 0) -> None:
        self.rows, self.padding = rows, padding

    def slots(self, step: int) -> int:
        return 1 if step < len(self.rows) else 0

    def fetch(self, step: int, slots) -> Batch:
        row = torch.tensor([self.rows[step]])
        tokens, labels = row[:, :-1], row[:, 1:].clone()
        if self.padding:
            labels[:, -self.padding :] = -100
        return Batch(torch.zeros(1, dtype=torch.int64), {"tokens": tokens, "labels": labels})


def brute(rows: list[list[int]], vocab: int, strength: float, a: int, b: int) -> float:
    pairs = [pair for row in rows for pair in itertools.pairwise(row)]
    unigram = (sum(second == b for _, second in pairs) + 1) / (len(pairs) + vocab)
    seen = sum(pair == (a, b) for pair in pairs)
    return (seen + strength * unigram) / (sum(first == a for first, _ in pairs) + strength)


ROWS = [[0, 1, 2, 1, 2, 1, 3], [3, 1, 2, 2, 2, 0]]


def test_every_chance_is_the_formula_and_each_row_sums_to_one():
    model = Bigram.count(Rows(*ROWS), 5)
    first, second = np.divmod(np.arange(25), 5)
    chances = np.exp(-model.nats(first, second))
    want = [brute(ROWS, 5, model.strength, int(a), int(b)) for a, b in zip(first, second, strict=True)]
    np.testing.assert_allclose(chances, want, rtol=1e-12)
    np.testing.assert_allclose(chances.reshape(5, 5).sum(1), 1.0, rtol=1e-12)


def test_the_strength_is_the_one_that_foretells_each_training_pair_best_from_the_others():
    model = Bigram.count(Rows(*ROWS), 5)
    pairs = [pair for row in ROWS for pair in itertools.pairwise(row)]

    def left_out(strength: float) -> float:
        nats = 0.0
        for i, (a, b) in enumerate(pairs):
            others = pairs[:i] + pairs[i + 1 :]
            unigram = (sum(second == b for _, second in others) + 1) / (len(others) + 5)
            seen = sum(pair == (a, b) for pair in others)
            nats -= math.log((seen + strength * unigram) / (sum(first == a for first, _ in others) + strength))
        return nats / len(pairs)

    for strength in STRENGTHS:
        assert model.left_out_nats(strength) == pytest.approx(left_out(strength), rel=1e-12)
    assert model.strength == min(STRENGTHS, key=left_out)


def test_padding_counts_for_nothing_and_a_limit_is_kept():
    assert [len(a) for a, _ in pairs_of(Rows(*ROWS, padding=2))] == [4, 3]
    assert [len(a) for a, _ in pairs_of(Rows(*ROWS), batches=1)] == [6]
    assert [len(a) for a, _ in pairs_of(Rows(*ROWS), most=5)] == [6]
    assert Bigram.count(Rows(*ROWS, padding=2), 5).counts_K.sum() == 7


def test_a_source_without_pairs_is_refused():
    with pytest.raises(ValueError, match="has no pairs"):
        Bigram.count(Rows(), 5)


def test_on_a_real_text_it_beats_single_letters_and_not_its_own_counts(tmp_path):
    settings = StandardLibrary(bytes=600_000, sequence_length=32, cache=tmp_path, epochs=1)
    text, held_out = (settings.build(SourceContext(0, split, 64)) for split in ("train", "validation"))
    model = Bigram.count(text, text.vocab_size)
    ones = model.seconds_V[model.seconds_V > 0] / model.seconds_V.sum()
    entropy = float(-(ones * np.log(ones)).sum())
    total = sum(len(a) for a, _ in pairs_of(text))
    assert total == model.counts_K.sum() == model.firsts_V.sum() == model.seconds_V.sum()
    assert model.loss(text) < model.loss(held_out) < entropy - 0.5
    assert model.loss(held_out, 2) != model.loss(held_out)
