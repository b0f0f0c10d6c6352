from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from resilin.optim.clip import clip_factor, global_norm


@settings(deadline=None, max_examples=30)
@given(sizes=st.lists(st.integers(1, 50), min_size=1, max_size=6), seed=st.integers(0, 99))
def test_the_global_norm_is_that_of_all_gradients_laid_end_to_end(sizes: list[int], seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    grads = [torch.randn(n, generator=g) for n in sizes]
    assert float(global_norm(grads)) == pytest.approx(float(torch.cat(grads).double().norm()), rel=1e-6)
    reference = nn.utils.get_total_norm(grads)
    assert float(global_norm(grads)) == pytest.approx(float(reference), rel=1e-6)


@settings(deadline=None, max_examples=50)
@given(data=st.data(), rows=st.integers(1, 20), size=st.integers(1, 700), seed=st.integers(0, 99))
def test_a_gradient_in_rows_has_the_norm_of_the_whole_to_the_bit(data: Any, rows: int, size: int, seed: int) -> None:
    absent = data.draw(st.sets(st.integers(0, rows - 1), max_size=rows - 1))
    whole = torch.randn(rows, size, generator=torch.Generator().manual_seed(seed))
    whole[list(absent)] = 0.0
    beside = torch.ones(5)
    parts = [None if row in absent else whole[row].clone() for row in range(rows)]
    assert float(global_norm([beside, parts])) == float(global_norm([beside, whole]))


def test_many_small_gradients_beside_a_large_one_are_not_lost() -> None:
    grads = [torch.tensor([1e4]), *[torch.tensor([0.1])] * 1000]  # in float32, 1e8 + 0.01 stays 1e8
    assert float(global_norm(grads)) ** 2 == pytest.approx(1e8 + 10.0, rel=1e-9)


def test_no_gradients_have_norm_zero_and_a_bad_one_shows() -> None:
    assert float(global_norm([])) == 0.0
    assert math.isnan(float(global_norm([torch.ones(3), torch.tensor([float("nan")])])))
    assert float(global_norm([torch.tensor([float("inf")]), torch.ones(2)])) == math.inf


@given(norm=st.floats(0, 1e6), limit=st.one_of(st.just(0.0), st.floats(1e-6, 1e3)))
def test_clipping_never_raises_the_norm_and_never_leaves_it_above_the_limit(norm: float, limit: float) -> None:
    factor = clip_factor(norm, limit)
    assert 0 < factor <= 1
    if limit:
        assert norm * factor <= limit * (1 + 1e-12)
        assert factor == 1.0 or norm > limit
    else:
        assert factor == 1.0


def test_a_negative_limit_is_refused() -> None:
    with pytest.raises(ValueError, match="-1"):
        clip_factor(1.0, -1.0)
