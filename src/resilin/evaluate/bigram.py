"""A smoothed bigram model by counting: the loss below which a model must have read more than one token back.

    p(b | a) = (count(a, b) + s * p(b)) / (count(a) + s),   p(b) = (count(b) + 1) / (N + V)

with N training pairs and V token ids. The weight s of the unigram distribution is the one of `STRENGTHS` under which
the training pairs are likeliest when each is foretold from all the others (leave-one-out cross-validation, which counts
give in closed form).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from resilin.data.packed import IGNORED
from resilin.nouns import Source

STRENGTHS = (0.01, 0.1, 1.0, 10.0, 100.0, 1000.0)
MOST_PAIRS = 50_000_000
"""Training pairs that are counted at most."""

Ids = NDArray[np.int64]


def pairs_of(source: Source, batches: int | None = None, most: int = MOST_PAIRS) -> Iterator[tuple[Ids, Ids]]:
    """(token, the token after it) of a source's batches, as two int64 arrays (N,) for each.

    Args:
        source: with the fields `tokens` and `labels`.
        batches: how many to read; None: until the source ends.
        most: stop after this many pairs.
    """
    step = found = 0
    while (batches is None or step < batches) and found < most and (slots := source.slots(step)):
        batch = source.fetch(step, range(slots))
        tokens_N, labels_N = batch["tokens"].flatten().numpy(), batch["labels"].flatten().numpy()
        counted_N = labels_N != IGNORED
        yield tokens_N[counted_N], labels_N[counted_N]
        step, found = step + 1, found + int(counted_N.sum())


@dataclass(frozen=True, slots=True)
class Bigram:
    """The counts of a text.

    Attributes:
        keys_K: a * V + b of each pair that occurs, rising.
        counts_K: how often it does.
        firsts_V: how often each token is the first of a pair.
        seconds_V: how often it is the second.
        strength: s.
    """

    keys_K: Ids
    counts_K: Ids
    firsts_V: Ids
    seconds_V: Ids
    strength: float

    @staticmethod
    def count(source: Source, vocab_size: int, batches: int | None = None) -> Bigram:
        """The model of a source's pairs.

        Raises:
            ValueError: the source has none.
        """
        keys_K, counts_K = np.zeros(0, np.int64), np.zeros(0, np.int64)
        for firsts_N, seconds_N in pairs_of(source, batches):
            new_K, times_K = np.unique(firsts_N * vocab_size + seconds_N, return_counts=True)
            keys_K, place = np.unique(np.concatenate([keys_K, new_K]), return_inverse=True)
            counts_K = np.bincount(place, np.concatenate([counts_K, times_K]), len(keys_K)).astype(np.int64)
        if not len(keys_K):
            raise ValueError("a bigram model needs a text of at least two tokens; the source has no pairs")
        firsts_V = np.bincount(keys_K // vocab_size, counts_K, vocab_size).astype(np.int64)
        seconds_V = np.bincount(keys_K % vocab_size, counts_K, vocab_size).astype(np.int64)
        unsmoothed = Bigram(keys_K, counts_K, firsts_V, seconds_V, 0.0)
        best = min(STRENGTHS, key=unsmoothed.left_out_nats)
        return Bigram(keys_K, counts_K, firsts_V, seconds_V, best)

    def left_out_nats(self, strength: float) -> float:
        """Mean nats per training pair, each foretold from the counts without it."""
        vocab_size, total = len(self.firsts_V), int(self.counts_K.sum())
        first_K, second_K = np.divmod(self.keys_K, vocab_size)
        unigram_K = self.seconds_V[second_K] / (total - 1 + vocab_size)
        seen_K = self.counts_K - 1 + strength * unigram_K
        chance_K = seen_K / (self.firsts_V[first_K] - 1 + strength)
        return float(-(self.counts_K * np.log(chance_K)).sum() / total)

    def nats(self, firsts_N: Ids, seconds_N: Ids) -> NDArray[np.float64]:
        """(N,) minus the log-probability of each second token after its first."""
        vocab_size, total = len(self.firsts_V), int(self.counts_K.sum())
        wanted_N = firsts_N * vocab_size + seconds_N
        place_N = np.minimum(np.searchsorted(self.keys_K, wanted_N), len(self.keys_K) - 1)
        count_N = np.where(self.keys_K[place_N] == wanted_N, self.counts_K[place_N], 0)
        unigram_N = (self.seconds_V[seconds_N] + 1) / (total + vocab_size)
        chance_N = (count_N + self.strength * unigram_N) / (self.firsts_V[firsts_N] + self.strength)
        return np.asarray(-np.log(chance_N), np.float64)

    def loss(self, source: Source, batches: int | None = None) -> float:
        """Mean nats per token of a source's first batches (None: all)."""
        nats = [self.nats(*pairs) for pairs in pairs_of(source, batches)]
        return float(np.concatenate(nats).mean())
