"""Which documents share a run of words with a text: an inverted index over n-grams, exact and without a limit of hits.

A document is a sequence of words (lower case, letters and digits only). Each n-gram becomes a 64-bit hash; the hashes
of all documents are sorted, so a look-up is a binary search, and every hit is compared word by word, so a collision of
hashes is no hit. About 24 bytes for each word indexed.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

_WORD = re.compile(r"\w+")
_BASE = np.uint64(0x9E3779B97F4A7C15)
_UNKNOWN = -1

Words = NDArray[np.int64]


def words_of(text: str) -> list[str]:
    """The words of a text: runs of letters, digits and underscores, after compatibility folding, in lower case."""
    return _WORD.findall(unicodedata.normalize("NFKC", text).casefold())


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: NDArray[np.uint64] = x ^ (x >> np.uint64(31))
    return mixed


def _hashes(words: Words, n: int) -> NDArray[np.uint64]:
    """A hash of the n words from each position on: (len(words) - n + 1,) uint64."""
    count = len(words) - n + 1
    if count < 1:
        return np.empty(0, np.uint64)
    mixed = _mix((words + 2).astype(np.uint64))
    hashes = np.zeros(count, np.uint64)
    for offset in range(n):
        hashes = hashes * _BASE + mixed[offset : offset + count]
    return _mix(hashes)


class _Lengths:
    """The places of all n-grams of one length."""

    def __init__(self, words: Words, starts: NDArray[np.int64], n: int) -> None:
        hashes = _hashes(words, n)
        first = np.arange(len(hashes), dtype=np.int64)
        # An n-gram lies in one document: the document of its first word is that of its last.
        inside = np.searchsorted(starts, first, side="right") == np.searchsorted(starts, first + n - 1, side="right")
        first = first[inside]
        order = np.argsort(hashes[first], kind="stable")
        self.places = first[order]
        self.hashes = hashes[self.places]


class NgramIndex:
    """The n-grams of some documents.

    Args:
        documents: texts; their numbers count from 0.
        n: words of an n-gram.

    Attributes:
        n: words of an n-gram.
        count: documents.
    """

    def __init__(self, documents: Iterable[str], n: int = 8) -> None:
        if n < 1:
            raise ValueError(f"an n-gram has at least 1 word, not {n}")
        self.n = n
        self._ids: dict[str, int] = {}
        self._whole: dict[bytes, list[int]] = {}
        parts: list[Words] = []
        starts = [0]
        for number, text in enumerate(documents):
            ids = np.asarray([self._ids.setdefault(word, len(self._ids)) for word in words_of(text)], np.int64)
            parts.append(ids)
            starts.append(starts[-1] + len(ids))
            self._whole.setdefault(ids.tobytes(), []).append(number)
        self.count = len(parts)
        self._words: Words = np.concatenate(parts) if parts else np.empty(0, np.int64)
        self._starts = np.asarray(starts[:-1], np.int64)
        self._stops = np.asarray(starts[1:], np.int64)
        self._lengths: dict[int, _Lengths] = {}

    def _of_length(self, n: int) -> _Lengths:
        if n not in self._lengths:
            self._lengths[n] = _Lengths(self._words, self._starts, n)
        return self._lengths[n]

    def _query(self, text: str) -> Words:
        return np.asarray([self._ids.get(word, _UNKNOWN) for word in words_of(text)], np.int64)

    def _hits(self, words: Words, n: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """All pairs of (position in `words`, place in the documents) where the same n words stand."""
        index = self._of_length(n)
        hashes = _hashes(words, n)
        low = np.searchsorted(index.hashes, hashes, side="left")
        sizes = np.searchsorted(index.hashes, hashes, side="right") - low
        positions = np.repeat(np.arange(len(hashes)), sizes)
        within = np.arange(int(sizes.sum())) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        places = index.places[np.repeat(low, sizes) + within]
        same = np.ones(len(places), bool)
        for offset in range(n):
            same &= words[positions + offset] == self._words[places + offset]
        return positions[same], places[same]

    def _document(self, places: NDArray[np.int64]) -> NDArray[np.int64]:
        # Empty documents start where the next one does: the last that starts there is the one that has the word.
        return np.searchsorted(self._starts, places, side="right") - 1

    def coverage(self, text: str) -> dict[int, float]:
        """For each document that shares an n-gram with the text: the share of the text's words that lie in one.

        A text of fewer than n words has no n-gram: documents of exactly the same words cover it whole, others not.
        """
        words = self._query(text)
        if not len(words):
            return {}
        if len(words) < self.n:
            return dict.fromkeys(self._whole.get(words.tobytes(), ()), 1.0)
        positions, places = self._hits(words, self.n)
        if not len(places):
            return {}
        pairs = np.unique(np.stack((self._document(places), positions), axis=1), axis=0)
        documents, starts = pairs[:, 0], pairs[:, 1]
        gaps = np.full(len(pairs), self.n, np.int64)
        same = documents[1:] == documents[:-1]
        gaps[:-1][same] = np.minimum(self.n, starts[1:][same] - starts[:-1][same])
        found, first = np.unique(documents, return_index=True)
        covered = np.add.reduceat(gaps, first)
        return {int(d): float(c) / len(words) for d, c in zip(found, covered, strict=True)}

    def phrase(self, text: str) -> set[int]:
        """The documents in which all words of the text stand one after another."""
        words = self._query(text)
        if not len(words) or bool((words == _UNKNOWN).any()):
            return set()
        n = min(self.n, len(words))
        positions, places = self._hits(words[:n], n)
        documents = self._document(places[positions == 0])
        return {
            int(document)
            for document, place in zip(documents, places[positions == 0], strict=True)
            if place + len(words) <= self._stops[document]
            and np.array_equal(self._words[place : place + len(words)], words)
        }


def score_fields(fields: Sequence[str], index: NgramIndex) -> dict[int, float]:
    """For each document that shares anything with some fields of an instance: the mean of their coverages.

    Fields without a word do not count.
    """
    texts = [field for field in fields if words_of(field)]
    total: dict[int, float] = {}
    for text in texts:
        for document, covered in index.coverage(text).items():
            total[document] = total.get(document, 0.0) + covered
    return {document: value / len(texts) for document, value in total.items()}


def phrase_fields(fields: Sequence[str], index: NgramIndex) -> dict[int, float]:
    """1 for each document that holds every field of an instance word for word."""
    texts = [field for field in fields if words_of(field)]
    if not texts:
        return {}
    return dict.fromkeys(set.intersection(*(index.phrase(text) for text in texts)), 1.0)
