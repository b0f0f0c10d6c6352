"""Claims about gains: differences and shares of two quantities, seed by seed."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence

from resilin.recipes.findings import Claim

Values = Mapping[int, float]
"""A quantity by seed."""


def gain_of(better: Values, worse: Values) -> list[float]:
    """How much lower `better` is, for every seed that has both."""
    return [worse[seed] - better[seed] for seed in sorted(set(better) & set(worse))]


def gain_claim(name: str, statement: str, found: Sequence[float], least: float, told: str) -> Claim:
    """Whether a gain, by seed, exceeds `least` by more than its standard error.

    Args:
        name: of the claim.
        statement: of it.
        found: the gain of each seed.
        least: what it must exceed.
        told: what the gain is, for the evidence.
    """
    if not found:
        return Claim(name=name, statement=statement, holds=False, evidence="no seed finished both")
    mean = statistics.fmean(found)
    error = statistics.stdev(found) / math.sqrt(len(found)) if len(found) > 1 else 0.0
    evidence = f"{told}: {mean:+.4f} (standard error {error:.4f} over {len(found)} seeds)"
    return Claim(name=name, statement=statement, holds=mean - error > least, evidence=evidence)


def share_claim(
    name: str, statement: str, shares: Sequence[float], most: float, words: str = " of it", *, digits: int = 6
) -> Claim:
    """Whether every seed's share is at most so large; one that is not a number is not, nor are none.

    Args:
        name: of the claim.
        statement: of it.
        shares: one quantity as a share of another, of each seed.
        most: what none may exceed.
        words: what the numbers are, for the evidence.
        digits: of `most`, there.
    """
    evidence = f"{', '.join(f'{share:.3f}' for share in shares)}{words}, expected at most {most:.{digits}g}"
    holds = bool(shares) and all(share <= most for share in shares)
    return Claim(name=name, statement=statement, holds=holds, evidence=evidence)
