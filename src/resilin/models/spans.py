"""Documents that lie one behind another in rows, as stretches: what attention over packed rows really has to compute.

A dense mask makes every product of a row and hides most of them. Where the stretches are known, each document's
attention is computed alone, and one that goes on from another (an answer behind a prompt that several answers share)
reads that one's keys without their being computed again.

Shapes: B rows, T tokens, N = B * T.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Span(NamedTuple):
    """A document, by places among the N tokens.

    Attributes:
        start: its first token.
        stop: one behind its last.
        before: first and one behind the last token of the document that it goes on from; (0, 0): none.
    """

    start: int
    stop: int
    before: tuple[int, int] = (0, 0)

    @property
    def keys(self) -> int:
        """How many keys its last query sees."""
        return self.stop - self.start + self.before[1] - self.before[0]


def runs_of(documents_BT: Tensor) -> Tensor:
    """(B * T,) int64: which run of equal numbers each token is in, counted over all rows; no run crosses rows."""
    first_BT = torch.ones_like(documents_BT, dtype=torch.bool)
    first_BT[:, 1:] = documents_BT[:, 1:] != documents_BT[:, :-1]
    return first_BT.flatten().cumsum(0) - 1


def spans_of(documents_BT: Tensor, continues_BT: Tensor | None = None) -> tuple[Span, ...] | None:
    """The documents of some rows as stretches, in order; None where one is interrupted by another.

    Args:
        documents_BT: the number of each token's document, on the host.
        continues_BT: the number of the document in the same row that it goes on from; -1: none.

    Raises:
        ValueError: a document goes on from one that does not stand before it.
    """
    T = documents_BT.shape[1]
    numbers_N, runs_N = documents_BT.flatten(), runs_of(documents_BT)
    starts = (torch.diff(runs_N, prepend=runs_N.new_full((1,), -1)) != 0).nonzero()[:, 0]
    stops = [*starts[1:].tolist(), numbers_N.numel()]
    numbers = numbers_N[starts].tolist()
    parents = [-1] * len(numbers) if continues_BT is None else continues_BT.flatten()[starts].tolist()
    found: dict[tuple[int, int], tuple[int, int]] = {}
    spans = []
    for start, stop, number, parent in zip(starts.tolist(), stops, numbers, parents, strict=True):
        row = start // T
        if (row, number) in found:
            return None
        if parent >= 0 and (row, parent) not in found:
            raise ValueError(f"row {row}: document {number} goes on from document {parent}, which is not before it")
        spans.append(Span(start, stop, found[row, parent] if parent >= 0 else (0, 0)))
        found[row, number] = (start, stop)
    return tuple(spans)


def asked_places(documents_BT: Tensor | None, asked_BT: Tensor) -> Tensor:
    """(N',) int64: the places that have to be computed: none behind the last one asked for of its document.

    Args:
        documents_BT: None: each row is one document.
        asked_BT: bool.
    """
    B, T = asked_BT.shape
    place_N = torch.arange(B * T, device=asked_BT.device)
    runs_N = place_N // T if documents_BT is None else runs_of(documents_BT)
    last_N = torch.full_like(place_N, -1).scatter_reduce_(0, runs_N, place_N.where(asked_BT.flatten(), -1), "amax")
    return (place_N <= last_N[runs_N]).nonzero()[:, 0]
