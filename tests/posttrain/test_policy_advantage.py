from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from resilin.posttrain.advantage import (
    equal_groups,
    gae,
    group_advantages,
    kl_estimate,
    token_rewards,
    whitened,
)

scores = st.lists(st.sampled_from([0.0, 1.0, 0.3, -10.0, 10.0]), min_size=8, max_size=8)


@given(scores, st.sampled_from([0.1, 3.0, 10.0, 1e6]), st.sampled_from(["std", "batch_std", "centered"]))
def test_advantages_of_groups_do_not_change_when_rewards_are_scaled(values: list[float], k: float, norm: str) -> None:
    one = torch.tensor(values, dtype=torch.float64)
    plain, scaled = (group_advantages(x, 4, norm) for x in (one, k * one))  # type: ignore[arg-type]
    torch.testing.assert_close(scaled, k * plain if norm == "centered" else plain, rtol=1e-9, atol=1e-9 * k)
    shifted = group_advantages(one + 5, 4, norm)  # type: ignore[arg-type]
    torch.testing.assert_close(shifted, plain, rtol=1e-9, atol=1e-9)


def test_groups_by_hand_and_equal_groups_are_exact_zeros() -> None:
    values = torch.tensor([1.0, 0.0, 0.0, 0.0, 0.1, 0.1, 0.1, 0.1])
    found = group_advantages(values, 4, "std")
    deviation = math.sqrt((0.75**2 + 3 * 0.25**2) / 3)
    torch.testing.assert_close(found[:4], torch.tensor([0.75, -0.25, -0.25, -0.25]).double() / deviation)
    assert found[4:].tolist() == [0.0] * 4
    assert equal_groups(values, 4).tolist() == [False, True]
    assert group_advantages(values, 4, "centered")[:4].tolist() == [0.75, -0.25, -0.25, -0.25]
    of_all = group_advantages(values, 4, "batch_std")
    torch.testing.assert_close(of_all[:4], torch.tensor([0.75, -0.25, -0.25, -0.25]).double() / values.double().std())
    assert of_all[4:].tolist() == [0.0] * 4


def test_gae_by_hand() -> None:
    mask = torch.tensor([[False, True, True, False], [True, True, True, True]])
    rewards = torch.tensor([[0.0, 1.0, 2.0, 0.0], [0.5, 0.0, 0.0, 3.0]], dtype=torch.float64)
    values = torch.tensor([[9.0, 0.3, 0.7, 9.0], [0.1, 0.2, 0.3, 0.4]], dtype=torch.float64) * mask
    advantages, returns = gae(rewards, values, mask, gamma=0.9, lam=0.8)
    last = 2 - 0.7
    first = 1 + 0.9 * 0.7 - 0.3 + 0.72 * last
    torch.testing.assert_close(advantages[0], torch.tensor([0, first, last, 0], dtype=torch.float64))
    expected, later, following = [], 0.0, 0.0
    for reward, value in zip(reversed(rewards[1].tolist()), reversed(values[1].tolist()), strict=True):
        later = reward + 0.9 * following - value + 0.72 * later
        following = value
        expected.insert(0, later)
    torch.testing.assert_close(advantages[1], torch.tensor(expected, dtype=torch.float64))
    torch.testing.assert_close(returns, (advantages + values) * mask)


def test_with_lambda_one_and_no_values_the_advantage_is_the_sum_of_later_rewards() -> None:
    mask = torch.tensor([[True, True, True]])
    rewards = token_rewards(torch.tensor([10.0]), torch.tensor([[1.0, 2.0, 3.0]]), mask)
    assert rewards.tolist() == [[-1.0, -2.0, 7.0]]
    advantages, _ = gae(rewards, torch.zeros(1, 3), mask, 1.0, 1.0)
    assert advantages.tolist() == [[4.0, 5.0, 7.0]]


@given(st.sampled_from([0.5, 2.0, 1000.0]))
def test_whitened_advantages_do_not_change_when_rewards_are_scaled(k: float) -> None:
    generator = torch.Generator().manual_seed(0)
    mask = torch.rand(3, 5, generator=generator) < 0.7
    mask[:, 0] = True
    values = torch.randn(3, 5, generator=generator, dtype=torch.float64)
    one, other = whitened(values, mask), whitened(k * values + 3, mask)
    torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)
    assert float(one[mask].mean()) == pytest.approx(0, abs=1e-12)
    assert float(one[mask].std()) == pytest.approx(1)
    assert not one[~mask].any()
    assert not whitened(torch.full((2, 2), 0.1), torch.ones(2, 2, dtype=torch.bool)).any()


def test_kl_estimators_agree_to_first_order_and_k3_is_never_negative() -> None:
    logp = torch.tensor([-1.0, -2.0, -0.5], dtype=torch.float64)
    reference = torch.tensor([-1.5, -1.0, -0.5], dtype=torch.float64)
    d = logp - reference
    torch.testing.assert_close(kl_estimate(logp, reference, "k1"), d)
    torch.testing.assert_close(kl_estimate(logp, reference, "k2"), d * d / 2)
    torch.testing.assert_close(kl_estimate(logp, reference, "k3"), (-d).exp() - 1 + d)
    assert bool((kl_estimate(logp, reference, "k3") >= 0).all())
    p = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    q = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)
    exact = (p * (p / q).log()).sum()
    for kind in ("k1", "k3"):  # unbiased: their mean under p is the divergence itself
        torch.testing.assert_close((p * kl_estimate(p.log(), q.log(), kind)).sum(), exact)  # type: ignore[arg-type]
