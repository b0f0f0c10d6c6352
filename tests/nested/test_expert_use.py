"""Statistics of how experts are used."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from resilin.nested import Budget, BudgetError
from resilin.nested.expert_use import by_load, most_used, normalised_entropy, overlap, overlaps, shares, top_count

COUNTS = st.lists(st.integers(0, 1000), min_size=2, max_size=12)


def test_entropy_is_1_for_equal_loads_and_0_for_one_expert():
    counts = torch.tensor([[5, 5, 5, 5], [0, 7, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0]])
    assert normalised_entropy(counts).tolist() == pytest.approx([1.0, 0.0, 0.5, 0.0])
    assert normalised_entropy(torch.tensor([[3]])).tolist() == [1.0]


@given(COUNTS)
def test_entropy_is_that_of_its_formula(counts):
    total = sum(counts)
    expected = -sum(n / total * math.log(n / total) for n in counts if n) / math.log(len(counts)) if total else 0.0
    assert float(normalised_entropy(torch.tensor(counts))) == pytest.approx(expected, abs=1e-12)
    assert float(shares(torch.tensor(counts)).sum()) == pytest.approx(1.0 if total else 0.0)


def test_overlap_of_the_most_used_quarter():
    one = torch.tensor([[9, 8, 1, 1, 1, 1, 1, 1], [9, 8, 1, 1, 1, 1, 1, 1]])
    other = torch.tensor([[8, 9, 1, 1, 1, 1, 1, 1], [9, 1, 8, 1, 1, 1, 1, 1]])
    assert overlap(one, other).tolist() == pytest.approx([1.0, 1 / 3])
    assert overlap(one, 9 - other).tolist() == pytest.approx([0.0, 1 / 3])
    assert list(overlaps({"a": one, "b": other, "c": one})) == [("a", "b"), ("a", "c"), ("b", "c")]
    assert top_count(8, 0.25) == 2
    assert top_count(3, 0.25) == 1
    for share in (0, 1.5):
        with pytest.raises(BudgetError, match="more than 0"):
            top_count(8, share)


@given(COUNTS.flatmap(lambda counts: st.tuples(st.just(counts), st.integers(1, len(counts)))))
def test_the_most_used_have_at_least_the_load_of_the_others(case):
    counts, count = case
    found = most_used(torch.tensor(counts), count)
    assert len(set(found)) == count
    assert list(found) == sorted(found)
    rest = [n for e, n in enumerate(counts) if e not in found]
    assert not rest or min(counts[e] for e in found) >= max(rest)


def test_a_budget_of_the_most_used():
    loads = [torch.tensor([1, 5, 3]), None, torch.tensor([2, 2, 2])]
    assert by_load(loads, 2) == Budget(experts=((1, 2), None, (0, 1)))
    with pytest.raises(BudgetError, match="4 of 3 experts"):
        by_load(loads, 4)
