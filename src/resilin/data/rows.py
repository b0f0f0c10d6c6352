"""Rows: which stretch of the token stream each training sample is.

A row of T inputs reads up to T + 1 tokens, [start, stop) of the stream: each but the last is an input, each but the
first is a label.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from resilin.data.errors import DataError
from resilin.data.stream import TokenStream

LongDocuments = Literal["truncate", "skip", "error"]
Packing = Literal["stream", "documents", "pad"]


@dataclass(frozen=True, slots=True)
class StreamRows:
    """Rows that cut the stream every T tokens: no token is lost and only the last row is padded.

    Row i starts on the last label of row i - 1, so every token but the stream's first is a label exactly once.
    """

    tokens: int
    sequence_length: int

    def __len__(self) -> int:
        return -(-(self.tokens - 1) // self.sequence_length) if self.tokens > 1 else 0

    def bounds(self, rows: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """First and last + 1 token of each row."""
        starts = rows * self.sequence_length
        return starts, np.minimum(starts + self.sequence_length + 1, self.tokens)


@dataclass(frozen=True, slots=True)
class DocumentRows:
    """Rows of whole documents, never cut.

    Attributes:
        starts: first token of each row.
        stops: last + 1.
        truncated: documents cut to the row's length.
        skipped: documents left out for their length.
        lost_tokens: tokens that these two cost.
    """

    starts: NDArray[np.int64]
    stops: NDArray[np.int64]
    truncated: int
    skipped: int
    lost_tokens: int

    def __len__(self) -> int:
        return len(self.starts)

    def bounds(self, rows: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """First and last + 1 token of each row."""
        return self.starts[rows], self.stops[rows]


Rows = StreamRows | DocumentRows


def document_rows(
    stream: TokenStream, sequence_length: int, *, one_each: bool, long_documents: LongDocuments
) -> DocumentRows:
    """Rows that hold whole documents: one each, or as many neighbours as fit.

    Args:
        stream: the tokens.
        sequence_length: inputs of a row; a document of one more token than that still fits.
        one_each: a row for every document instead of packing neighbours.
        long_documents: what becomes of a document that fits in no row.

    Raises:
        DataError: for a document that is too long where `long_documents` is "error".
    """
    room = sequence_length + 1
    firsts = stream.starts(0, len(stream))
    if len(stream) and (not len(firsts) or firsts[0] > 0):
        firsts = np.concatenate(([0], firsts))
    lasts = np.append(firsts[1:], len(stream))
    row_starts, row_stops = [], []
    truncated = skipped = lost = number = 0
    while number < len(firsts):
        start = int(firsts[number])
        after = number + 1 if one_each else int(np.searchsorted(lasts, start + room, side="right"))
        length = int(lasts[number]) - start
        if length > room:
            after = number + 1
            if long_documents == "error":
                raise DataError(
                    f"{stream.place(start)}: document {number} has {length} tokens; a row holds {room}: raise "
                    "sequence_length, or set long_documents to truncate or skip"
                )
            lost += length - room if long_documents == "truncate" else length
            if long_documents == "skip":
                skipped += 1
                number = after
                continue
            truncated += 1
        row_starts.append(start)
        row_stops.append(min(int(lasts[after - 1]), start + room))
        number = after
    return DocumentRows(np.asarray(row_starts, np.int64), np.asarray(row_stops, np.int64), truncated, skipped, lost)


def make_rows(stream: TokenStream, sequence_length: int, packing: Packing, long_documents: LongDocuments) -> Rows:
    """The rows of a stream: cut anywhere ("stream"), whole documents ("documents"), or one document each ("pad")."""
    if packing == "stream":
        return StreamRows(len(stream), sequence_length)
    return document_rows(stream, sequence_length, one_each=packing == "pad", long_documents=long_documents)
