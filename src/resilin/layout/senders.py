"""Which of several copies a piece is taken from, so that no place sends much more than another.

Shapes: K pieces, C classes (different regions that the source holds), P places.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from resilin.layout.boxes import Ints
from resilin.layout.holdings import Holdings


@dataclass(frozen=True, eq=False)
class Copies:
    """The holdings of one tensor, those of the same region together.

    Attributes:
        rows: (N,) rows of the holdings, ordered by class.
        begins: (C,) the first of each class in `rows`.
        counts: (C,) how many each class has.
    """

    rows: Ints
    begins: Ints
    counts: Ints

    @classmethod
    def of(cls, classes: Ints, number: int) -> Copies:
        """From (N,) the class of each holding."""
        counts = np.bincount(classes, minlength=number).astype(np.int64)
        return cls(np.argsort(classes, kind="stable").astype(np.int64), np.cumsum(counts) - counts, counts)


def choose(held: Holdings, copies: Copies, classes: Ints, nbytes: Ints, load: NDArray[np.float64]) -> Ints:
    """A holding for each piece: the largest pieces first, to the copies that have sent least so far, in turn.

    Args:
        held: the holdings of the tensor at the source.
        copies: them, by class.
        classes: (K,) the class of each piece.
        nbytes: (K,) its bytes.
        load: (P,) bytes that each place sends already; what is chosen here is added to it.

    Returns:
        (K,) rows of `held`.
    """
    senders = held.places[copies.rows]
    classed = np.repeat(np.arange(len(copies.counts)), copies.counts)
    by_load = copies.rows[np.lexsort((load[senders], classed))]  # within a class, who has sent least comes first
    order = np.lexsort((-nbytes, classes))
    ordered = classes[order]
    first = np.ones(len(order), dtype=bool)
    first[1:] = ordered[1:] != ordered[:-1]
    turn = np.arange(len(order)) - np.maximum.accumulate(np.where(first, np.arange(len(order)), 0))
    rows = np.empty(len(order), dtype=np.int64)
    rows[order] = by_load[copies.begins[ordered] + turn % copies.counts[ordered]]
    load += np.bincount(held.places[rows], nbytes.astype(np.float64), minlength=len(load))
    return rows
