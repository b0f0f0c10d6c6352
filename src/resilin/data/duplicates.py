"""How much of a data set is there more than once: repeated passages are epochs that nobody counted."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from resilin.data.shards import TokenShards

_BASE = 0x9E3779B97F4A7C15
_SAMPLE = 2_000_000


@dataclass(frozen=True, slots=True)
class Duplicates:
    """What was found.

    Attributes:
        rate: share of the passages that had occurred before, in [0, 1]: about the share of repeated text.
        passage: tokens of a passage.
        documents: documents that are token for token an earlier one.
        tokens: how many tokens were looked at.
    """

    rate: float
    passage: int
    documents: int
    tokens: int


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    x = (x ^ (x >> np.uint64(32))) * np.uint64(0xD6E8FEB86659FD93)
    mixed: NDArray[np.uint64] = x ^ (x >> np.uint64(32))
    return mixed


def passage_hashes(tokens: NDArray[Any], passage: int) -> NDArray[np.uint64]:
    """A hash of the `passage` tokens (a power of two) from each position on: (len(tokens) - passage + 1,) uint64.

    Built by doubling: the hash of 2k tokens is that of the first k times base**k plus that of the next k, so 32
    tokens cost five passes over the array.
    """
    if passage < 1 or passage & (passage - 1):
        raise ValueError(f"passage should be a power of two, not {passage}")
    hashes = _mix(tokens.astype(np.uint64) + np.uint64(1))
    width = 1
    while width < passage and len(hashes) > width:
        power = np.uint64(pow(_BASE, width, 2**64))
        hashes = hashes[:-width] * power + hashes[width:]
        width *= 2
    return _mix(hashes) if width == passage else np.empty(0, np.uint64)


def duplicate_rate(shards: TokenShards, *, passage: int = 32, most_tokens: int = 256_000_000) -> Duplicates:
    """The approximate duplicate rate of a data set.

    Passages are sampled by their own hash (all copies of one are taken, or none), so the rate is an unbiased
    estimate whatever the sample; up to two million passages are taken.

    Args:
        shards: the data.
        passage: tokens of a passage, a power of two. Short ones find common phrases, long ones copies.
        most_tokens: look at this many tokens at most, from the beginning.
    """
    total = min(shards.token_count, most_tokens)
    every = np.uint64(max(1, total // _SAMPLE))
    found: list[NDArray[np.uint64]] = []
    seen: set[bytes] = set()
    documents = looked = 0
    for number, shard in enumerate(shards.shards):
        if looked >= most_tokens:
            break
        tokens = shards.tokens(number)[: most_tokens - looked]
        looked += len(tokens)
        hashes = passage_hashes(tokens, passage)
        found.append(hashes[hashes % every == 0])
        edges = [*shards.starts(number).tolist(), shard.tokens]
        for start, stop in pairwise(edges):
            if stop <= len(tokens):
                key = hashlib.blake2b(tokens[start:stop].tobytes(), digest_size=16).digest()
                documents += key in seen
                seen.add(key)
    sampled = np.concatenate(found) if found else np.empty(0, np.uint64)
    rate = 1.0 - len(np.unique(sampled)) / len(sampled) if len(sampled) else 0.0
    return Duplicates(rate, passage, documents, looked)
