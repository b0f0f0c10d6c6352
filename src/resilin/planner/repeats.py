"""What repeating data costs: how many fresh tokens a repeated token is worth.

Data-constrained scaling (Muennighoff et al., 2023, arXiv 2305.16264, equation 5): D unique tokens seen E times act
like D' = D + D R (1 - exp(-(E - 1) / R)) fresh ones, with R near 15.4: up to 4 epochs cost almost nothing, beyond
about 40 nothing is gained. Documents repeated inside the corpus are hidden epochs: they lower D.
"""

from __future__ import annotations

import math

HALF_LIFE_EPOCHS = 15.387756
"""R of the paper's fit: the epochs over which a repetition's worth falls to 1/e."""


def unique_tokens(available: float, duplicate_rate: float = 0.0) -> float:
    """D, without the share of the corpus that repeats another part of it.

    Raises:
        ValueError: a rate outside [0, 1).
    """
    if not 0 <= duplicate_rate < 1:
        raise ValueError(f"the duplicate rate is a share of the corpus in [0, 1), not {duplicate_rate:g}")
    return available * (1 - duplicate_rate)


def effective_tokens(tokens: float, unique: float) -> float:
    """D': the fresh tokens that `tokens` processed over `unique` different ones are worth; at most `tokens`."""
    if tokens <= unique:
        return tokens
    repeats = tokens / unique - 1
    return unique * (1 + HALF_LIFE_EPOCHS * -math.expm1(-repeats / HALF_LIFE_EPOCHS))
