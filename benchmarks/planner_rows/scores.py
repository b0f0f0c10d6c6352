"""How near predictions are to what was measured."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def spearman(a: Sequence[float], b: Sequence[float]) -> float:
    """The rank correlation; equal values share the mean of their ranks."""
    return float(np.corrcoef(_ranks(a), _ranks(b))[0, 1])


def _ranks(values: Sequence[float]) -> list[float]:
    ordered = sorted(values)
    return [(ordered.index(v) + len(ordered) - 1 - ordered[::-1].index(v)) / 2 for v in values]


def ordered(measured: Sequence[float], told: Sequence[float], noise: float) -> tuple[float, int]:
    """Of pairs whose measured values differ by more than the noise, the share that is told in that order; and how many.

    Args:
        measured: values.
        told: predictions of them.
        noise: as a share of the smaller value.
    """
    right, pairs = 0, 0
    for i, one in enumerate(measured):
        for j in range(i):
            other = measured[j]
            if abs(one - other) > noise * min(one, other):
                pairs += 1
                right += (one > other) is (told[i] > told[j])
    return (right / pairs if pairs else float("nan")), pairs
