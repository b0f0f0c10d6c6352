"""How a mixture of experts is used: loads of experts, how even they are, and which experts kinds of text share.

Pure functions of counts: choices that fell on each expert, by layer, for any label (a domain, a language, a modality).
Shapes: L layers with experts, E experts.
Source: ERNIE 5.0 (2026), analysis of modality-agnostic routing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from resilin.nested.budgets import Budget, BudgetError


def shares(counts_LE: Tensor) -> Tensor:
    """(..., E) float64: each expert's share of a layer's choices; of a layer without any, zeros."""
    counts = counts_LE.double()
    found: Tensor = counts / counts.sum(-1, keepdim=True).clamp(min=1)
    return found


def normalised_entropy(counts_LE: Tensor) -> Tensor:
    """(...) float64: NE = -sum p ln p / ln E of each layer. 1: all experts have the same load; 0: one has it all.

    A single expert has 1.
    """
    share_LE = shares(counts_LE)
    experts = counts_LE.shape[-1]
    if experts == 1:
        return torch.ones(share_LE.shape[:-1], dtype=torch.float64)
    entropy: Tensor = torch.special.entr(share_LE).sum(-1)
    return entropy / math.log(experts)


def most_used(counts_E: Tensor, count: int) -> tuple[int, ...]:
    """The numbers of the `count` experts with the largest loads, ascending; of equal ones the first.

    Raises:
        BudgetError: there are not so many.
    """
    if not 1 <= count <= len(counts_E):
        raise BudgetError(f"{count} of {len(counts_E)} experts: expected 1 to {len(counts_E)}")
    order = counts_E.double().argsort(descending=True, stable=True)
    return tuple(sorted(order[:count].tolist()))


def top_count(experts: int, share: float) -> int:
    """How many experts a share of them is: rounded, at least one.

    Raises:
        BudgetError: the share is not above 0 and at most 1.
    """
    if not 0 < share <= 1:
        raise BudgetError(f"the share of experts is {share:g}: expected more than 0 and at most 1")
    return max(1, round(share * experts))


def overlap(one_LE: Tensor, other_LE: Tensor, share: float = 0.25) -> Tensor:
    """(L,) float64: intersection over union of the most used experts of two labels, in each layer.

    Args:
        one_LE: counts of one.
        other_LE: of the other.
        share: of the experts that count as most used.
    """
    count = top_count(one_LE.shape[-1], share)
    found = []
    for one_E, other_E in zip(one_LE, other_LE, strict=True):
        one, other = set(most_used(one_E, count)), set(most_used(other_E, count))
        found.append(len(one & other) / len(one | other))
    return torch.tensor(found, dtype=torch.float64)


def overlaps(counts: Mapping[str, Tensor], share: float = 0.25) -> dict[tuple[str, str], Tensor]:
    """`overlap` of every pair of labels, in their order: (L,) each."""
    names = list(counts)
    return {
        (one, other): overlap(counts[one], counts[other], share)
        for at, one in enumerate(names)
        for other in names[at + 1 :]
    }


def by_load(counts: Sequence[Tensor | None], experts: int) -> Budget:
    """The budget of the most used experts of every layer.

    Args:
        counts: (E,) of each layer of the model, in order; None: the layer has no experts.
        experts: how many of them to keep.

    Raises:
        BudgetError: a layer has fewer.
    """
    return Budget(experts=tuple(None if one is None else most_used(one, experts) for one in counts))
