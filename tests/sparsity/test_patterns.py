"""Masks keep the right number, the largest, and the first of equals."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from resilin.sparsity.patterns import n_of_m_mask, share_of_row_mask


@given(
    n=st.integers(1, 8),
    extra=st.integers(0, 24),
    rows=st.integers(1, 4),
    groups=st.integers(1, 3),
    seed=st.integers(0, 99),
)
def test_each_group_keeps_exactly_n_and_they_are_the_largest(
    n: int, extra: int, rows: int, groups: int, seed: int
) -> None:
    m = n + extra
    scores = torch.rand(rows, groups * m, generator=torch.Generator().manual_seed(seed))
    mask = n_of_m_mask(scores, n, m).view(rows, groups, m)
    assert mask.dtype == torch.bool
    assert (mask.sum(-1) == n).all()
    grouped = scores.view(rows, groups, m)
    smallest_kept = grouped.masked_fill(~mask, torch.inf).amin(-1)
    largest_gone = grouped.masked_fill(mask, -torch.inf).amax(-1)
    assert (smallest_kept >= largest_gone).all()


@pytest.mark.parametrize("m", [4, 20])
def test_of_equal_scores_the_first_are_kept(m: int) -> None:
    mask = n_of_m_mask(torch.zeros(1, m), 2, m)
    assert mask[0].nonzero()[:, 0].tolist() == [0, 1]
    mixed = torch.zeros(1, m)
    mixed[0, 2] = 1.0
    assert n_of_m_mask(mixed, 2, m)[0].nonzero()[:, 0].tolist() == [0, 2]


def test_a_last_group_that_is_smaller_keeps_at_most_n() -> None:
    mask = n_of_m_mask(torch.tensor([[4.0, 3.0, 2.0, 1.0, 1.0, 2.0, 3.0]]), 2, 4)
    assert mask[0].tolist() == [True, True, False, False, False, True, True]
    assert n_of_m_mask(torch.zeros(1, 5), 2, 4)[0].tolist() == [True, True, False, False, True]


@given(inputs=st.integers(1, 40), density=st.floats(0.01, 1), seed=st.integers(0, 99))
def test_a_share_of_a_row_keeps_its_largest(inputs: int, density: float, seed: int) -> None:
    scores = torch.rand(3, inputs, generator=torch.Generator().manual_seed(seed))
    mask = share_of_row_mask(scores, density)
    kept = max(1, round(density * inputs))
    assert (mask.sum(1) == kept).all()
    expected = torch.zeros_like(mask).scatter_(1, scores.topk(kept).indices, True)
    assert torch.equal(mask, expected)
