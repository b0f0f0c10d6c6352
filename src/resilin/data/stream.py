"""A stream of tokens: chosen pieces of token shards, one after another, as if they were one array."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate, pairwise

import numpy as np
from numpy.typing import NDArray

from resilin.data.shards import TokenArray, TokenShards

Ranges = Sequence[tuple[int, int]]
"""Half-open intervals of global token positions (positions in all shards laid end to end), in order, disjoint."""


class TokenStream:
    """The tokens of some ranges of a shard folder, renumbered from 0.

    A held-out split, or the part of a data set that a run may see, is a stream with gaps: nothing is copied, and the
    memory it takes is a few numbers for every gap.

    Args:
        shards: the data.
        ranges: which global positions belong to the stream.
    """

    def __init__(self, shards: TokenShards, ranges: Ranges) -> None:
        self.shards = shards
        self._bases = np.cumsum([0, *(shard.tokens for shard in shards.shards)])
        segments: list[tuple[int, int, int]] = []  # shard, first token within it, length
        for start, stop in ranges:
            while start < stop:
                number = int(np.searchsorted(self._bases, start, side="right")) - 1
                end = min(stop, int(self._bases[number + 1]))
                segments.append((number, start - int(self._bases[number]), end - start))
                start = end
        self._segments = segments
        # A list: bisect on it is several times faster than searchsorted for one number.
        self._firsts = [0, *accumulate(length for _, _, length in segments)]

    def __len__(self) -> int:
        return self._firsts[-1]

    def _pieces(self, start: int, stop: int) -> list[tuple[int, int, int, int]]:
        """(position in the stream, shard, first, last + 1 within the shard) of each piece of [start, stop)."""
        pieces = []
        number = bisect_right(self._firsts, start) - 1
        while start < stop:
            shard, offset, length = self._segments[number]
            skip = start - self._firsts[number]
            take = min(stop - start, length - skip)
            pieces.append((start, shard, offset + skip, offset + skip + take))
            start += take
            number += 1
        return pieces

    def read_into(self, out: TokenArray, start: int, stop: int) -> None:
        """Copy the tokens [start, stop) into the first places of `out`."""
        for at, shard, first, last in self._pieces(start, stop):
            out[at - start : at - start + last - first] = self.shards.tokens(shard)[first:last]

    def units_into(self, out: TokenArray, start: int, stop: int) -> None:
        """Copy which of the tokens [start, stop) are to be learnt into the first places of `out`."""
        for at, shard, first, last in self._pieces(start, stop):
            out[at - start : at - start + last - first] = self.shards.units(shard)[first:last]

    def starts(self, start: int, stop: int) -> NDArray[np.int64]:
        """Where documents start within [start, stop), in stream positions, increasing."""
        found = []
        for at, shard, first, last in self._pieces(start, stop):
            starts = self.shards.starts(shard)
            low, high = np.searchsorted(starts, [first, last])
            if low < high:
                found.append(starts[low:high].astype(np.int64) + (at - first))
        return np.concatenate(found) if found else np.empty(0, np.int64)

    def place(self, position: int) -> str:
        """File and byte of a token, for messages."""
        _, shard, first, _ = self._pieces(position, position + 1)[0]
        name = self.shards.shards[shard].name
        return f"{self.shards.folder / name}.tokens, byte {first * self.shards.dtype.itemsize}"


def complement(ranges: Ranges, total: int) -> list[tuple[int, int]]:
    """The ranges of [0, total) that `ranges` leave free."""
    edges = [(0, 0), *ranges, (total, total)]
    return [(left[1], right[0]) for left, right in pairwise(edges) if left[1] < right[0]]
