"""Tables of owners: fair, and as few shards as can be change hands."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from resilin.layout import LayoutError
from resilin.layout.dealing import deal, redeal


@given(st.integers(1, 40), st.integers(1, 9))
def test_shards_are_dealt_in_fair_runs(shards, owners):
    table = deal(shards, owners)
    assert list(table) == sorted(table)
    counts = [table.count(owner) for owner in range(owners)]
    assert max(counts) - min(counts) <= 1


@given(st.lists(st.one_of(st.none(), st.integers(0, 3)), min_size=1, max_size=7), st.integers(1, 3))
def test_no_fair_table_changes_fewer_hands(table, owners):
    again = redeal(table, owners)
    counts = [again.count(owner) for owner in range(owners)]
    assert max(counts) - min(counts) <= 1
    fair = [
        other
        for other in itertools.product(range(owners), repeat=len(table))
        if max(c := [other.count(o) for o in range(owners)]) - min(c) <= 1
    ]
    changed = [sum(a != b for a, b in zip(table, other, strict=True)) for other in fair]
    assert sum(a != b for a, b in zip(table, again, strict=True)) == min(changed)


def test_a_lost_owner_costs_its_shards_and_a_new_one_its_share():
    table = deal(12, 4)
    lost = [None if owner == 2 else owner - (owner > 2) for owner in table]
    assert sum(a != b for a, b in zip(lost, redeal(lost, 3), strict=True)) == 3
    assert sum(a != b for a, b in zip(table, redeal(table, 6), strict=True)) == 4
    assert redeal(table, 4) == table
    with pytest.raises(LayoutError, match="cannot be dealt"):
        redeal([], 2)
    with pytest.raises(LayoutError, match="cannot be dealt"):
        deal(3, 0)
