"""The held-out split: which documents, or which end of the stream, training never sees."""

from __future__ import annotations

from typing import Literal

import numpy as np

from resilin.config import Settings
from resilin.data.errors import DataError
from resilin.data.permutation import Permutation
from resilin.data.settings import Split
from resilin.data.shards import TokenShards
from resilin.data.stream import Ranges, TokenStream, complement
from resilin.keys import hash64


class HeldOut(Settings):
    """How the validation split is cut off. It does not depend on the run's seed: all runs compare on one split."""

    fraction: float = 0.05
    """Part held out, of the documents or of the tokens; 0 holds nothing out, 1 everything (data only measured on)."""
    by: Literal["documents", "tail"] = "documents"
    """`documents`: whole documents drawn at random; `tail`: the last tokens (for a data set that is one document)."""
    seed: int = 0
    """Which documents are drawn."""


def held_out_ranges(shards: TokenShards, settings: HeldOut) -> list[tuple[int, int]]:
    """The global token ranges of the validation split.

    Raises:
        DataError: if there are too few documents to hold one out and keep one.
    """
    if not 0.0 <= settings.fraction <= 1.0:
        raise DataError(f"held_out.fraction = {settings.fraction}: should be from 0 to 1")
    total = shards.token_count
    if settings.fraction == 0.0:
        return []
    if settings.fraction == 1.0:
        return [(0, total)]
    if settings.by == "tail":
        size = max(1, round(total * settings.fraction))
        return [(total - size, total)]
    count = shards.document_count
    if count < 2:
        raise DataError(
            f"{shards.folder}: {count} document: no document can be held out; set held_out.by=tail to hold out the "
            "last tokens, or held_out.fraction=0"
        )
    size = min(count - 1, max(1, round(count * settings.fraction)))
    chosen = np.sort(Permutation(count, hash64("held out", settings.seed))(np.arange(size)))
    # Document number -> global position, one shard after another.
    bounds: list[np.ndarray] = [np.empty((0, 2), np.int64)]
    document_base = token_base = 0
    for number, shard in enumerate(shards.shards):
        starts = shards.starts(number)
        mine = chosen[(chosen >= document_base) & (chosen < document_base + shard.documents)] - document_base
        if len(mine):
            after = np.full(len(mine), -1, np.int64)
            has_next = mine + 1 < shard.documents
            after[has_next] = starts[mine[has_next] + 1].astype(np.int64) + token_base
            after[~has_next] = _next_start(shards, number + 1, token_base + shard.tokens)
            bounds.append(np.stack((starts[mine].astype(np.int64) + token_base, after), axis=1))
        document_base += shard.documents
        token_base += shard.tokens
    merged: list[tuple[int, int]] = []
    for start, stop in np.concatenate(bounds).tolist():
        if merged and merged[-1][1] == start:
            merged[-1] = (merged[-1][0], stop)
        else:
            merged.append((start, stop))
    return merged


def _next_start(shards: TokenShards, shard: int, token_base: int) -> int:
    """Global position of the first document start from `shard` on, or the end of the stream."""
    for number in range(shard, len(shards.shards)):
        starts = shards.starts(number)
        if len(starts):
            return token_base + int(starts[0])
        token_base += shards.shards[number].tokens
    return token_base


def split_stream(shards: TokenShards, settings: HeldOut, split: Split) -> TokenStream:
    """The stream of one split; the two are disjoint and together are every token."""
    held = held_out_ranges(shards, settings)
    ranges: Ranges = held if split == "validation" else complement(held, shards.token_count)
    return TokenStream(shards, ranges)
