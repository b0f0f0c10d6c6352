"""The keyed permutation is a bijection of any size, differs by key and mixes evenly."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from resilin.data.permutation import Permutation

quick = settings(deadline=None, max_examples=50)


@quick
@given(n=st.integers(1, 3000), key=st.integers(0, 2**64 - 1))
def test_any_key_permutes_any_domain(n: int, key: int) -> None:
    values = Permutation(n, key)(np.arange(n))
    assert np.array_equal(np.sort(values), np.arange(n))


@quick
@given(n=st.integers(1, 2**62), key=st.integers(0, 2**64 - 1), data=st.data())
def test_the_inverse_takes_any_element_of_any_domain_back(n: int, key: int, data: st.DataObject) -> None:
    position = np.asarray([data.draw(st.integers(0, n - 1))])
    permutation = Permutation(n, key)
    value = permutation(position)
    assert 0 <= int(value[0]) < n
    assert np.array_equal(permutation.inverse(value), position)


def test_each_key_gives_its_own_order_and_always_the_same() -> None:
    first, again, other = (Permutation(1000, key)(np.arange(1000)) for key in (1, 1, 2))
    assert np.array_equal(first, again)
    assert np.mean(first == other) < 0.02


def test_a_batch_of_positions_gives_what_each_alone_gives() -> None:
    permutation = Permutation(777, 5)
    together = permutation(np.arange(777))
    assert [int(permutation(np.asarray([i]))[0]) for i in range(0, 777, 50)] == together[::50].tolist()


def test_over_many_keys_every_value_comes_first_equally_often() -> None:
    n, keys = 7, 3500
    counts = np.bincount([int(Permutation(n, key)(np.asarray([0]))[0]) for key in range(keys)], minlength=n)
    chi_square = float(((counts - keys / n) ** 2 / (keys / n)).sum())
    assert chi_square < 22.5  # 6 degrees of freedom, p = 0.001


def test_neighbours_are_torn_apart() -> None:
    values = Permutation(10_000, 3)(np.arange(10_000))
    steps = np.abs(np.diff(values))
    assert abs(float(steps.mean()) - 10_000 / 3) < 150  # the mean distance of two independent places
    assert abs(float(np.corrcoef(values[:-1], values[1:])[0, 1])) < 0.05


@pytest.mark.parametrize("position", [-1, 10])
def test_a_position_outside_is_refused(position: int) -> None:
    with pytest.raises(IndexError, match=r"not all in \[0, 10\)"):
        Permutation(10, 1)(np.asarray([position]))


def test_an_empty_domain_is_refused() -> None:
    with pytest.raises(ValueError, match="between 1 and"):
        Permutation(0, 1)
