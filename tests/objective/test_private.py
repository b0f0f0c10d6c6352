"""DP-SGD: clipped and noised gradients by sample, however a step is split; the accounting of its epsilon."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from resilin.keys import Keys
from resilin.models.decoder import Decoder
from resilin.models.decoder_settings import DecoderSettings
from resilin.nouns import Batch
from resilin.objective.next_token import NextToken
from resilin.objective.private import Private, PrivateLoss, epsilon, renyi

BATCH = 4


@pytest.fixture(scope="module")
def model() -> Decoder:
    found = Decoder(DecoderSettings(vocab_size=20, hidden_size=8, layers=1, heads=2, init_std=0.5), seed=0)
    found.embed.weight.requires_grad_(False)
    return found


def batch() -> Batch:
    ids = torch.randint(0, 20, (BATCH, 7), generator=torch.Generator().manual_seed(0))
    return Batch(torch.arange(BATCH), {"tokens": ids[:, :-1], "labels": ids[:, 1:]})


def keys(step: int = 3) -> Keys:
    return Keys(0, step, torch.arange(BATCH))


def gradients(
    model: Decoder, noise: float, largest: float, sizes: tuple[int, ...], step: int = 3
) -> dict[str, torch.Tensor]:
    objective = PrivateLoss(Private(noise=noise, largest=largest), NextToken().build(), BATCH)
    model.zero_grad()
    at = 0
    for size in sizes:
        loss = objective(model, batch().rows(at, at + size), keys(step).rows(at, at + size))
        assert float(loss.units) == size
        loss.sum.backward()
        at += size
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def one_by_one(model: Decoder) -> list[dict[str, torch.Tensor]]:
    plain, found = NextToken().build(), []
    for row in range(BATCH):
        model.zero_grad()
        loss = plain(model, batch().rows(row, row + 1), None)
        (loss.sum / loss.units).backward()
        found.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    return found


def norm(tree: dict[str, torch.Tensor]) -> float:
    return float(torch.stack([g.norm() for g in tree.values()]).norm())


@pytest.mark.parametrize("largest", [1e9, 0.5])
def test_without_noise_it_is_the_sum_of_clipped_gradients(model, largest):
    each = one_by_one(model)
    factors = [min(1.0, largest / norm(tree)) for tree in each]
    assert (min(factors) < 1) == (largest == 0.5)
    found = gradients(model, 0.0, largest, (BATCH,))
    assert "embed.weight" not in found
    for name, gradient in found.items():
        expected = sum(factor * tree[name] for factor, tree in zip(factors, each, strict=True))
        torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize("sizes", [(1, 1, 1, 1), (1, 3)])
def test_how_a_step_is_split_changes_nothing(model, sizes):
    whole, parts = gradients(model, 1.0, 0.5, (BATCH,)), gradients(model, 1.0, 0.5, sizes)
    for name, gradient in whole.items():
        torch.testing.assert_close(parts[name], gradient)


def test_the_noise_of_a_step_has_standard_deviation_sigma_c(model):
    sigma, c = 3.0, 0.1
    plain = gradients(model, 0.0, c, (BATCH,))
    noise = torch.cat(
        [
            torch.cat([(gradients(model, sigma, c, (BATCH,), step)[n] - plain[n]).flatten() for n in plain])
            for step in range(3)
        ]
    )
    assert float(noise.std()) == pytest.approx(sigma * c, rel=0.05)
    assert abs(float(noise.mean())) < 4 * sigma * c / math.sqrt(noise.numel())
    again = gradients(model, sigma, c, (BATCH,), 3)
    assert all(torch.equal(again[n], g) for n, g in gradients(model, sigma, c, (BATCH,), 3).items())


def test_evaluation_is_that_of_what_is_wrapped(model):
    objective = PrivateLoss(Private(), NextToken().build(), BATCH)
    with torch.no_grad():
        assert torch.equal(objective(model, batch(), None).sum, NextToken().build()(model, batch(), None).sum)


@given(noise=st.floats(0.5, 5), share=st.floats(0.001, 0.5), order=st.integers(2, 20))
@settings(max_examples=30, deadline=None)
def test_the_divergence_is_that_of_the_sampled_gaussian(noise, share, order):
    """By numbers: E over N(0, s) of ((1 - q) + q N(1, s) / N(0, s))^order."""
    x = torch.linspace(-20 * noise, 20 * noise + order, 200_001, dtype=torch.float64)
    log_density = -(x**2) / (2 * noise**2) - math.log(noise * math.sqrt(2 * math.pi))
    ratio = torch.logaddexp(torch.full_like(x, math.log1p(-share)), math.log(share) + (2 * x - 1) / (2 * noise**2))
    moment = torch.logsumexp(log_density + order * ratio, 0) + math.log(float(x[1] - x[0]))
    assert renyi(noise, share, order) == pytest.approx(float(moment) / (order - 1), rel=1e-4, abs=1e-8)


def test_epsilon_falls_with_noise_and_grows_with_steps():
    told = [epsilon(noise, 0.01, 1000, 1e-5) for noise in (0.5, 1.0, 2.0)]
    assert told == sorted(told, reverse=True)
    assert epsilon(1.0, 0.01, 2000, 1e-5) > told[1] > epsilon(1.0, 0.001, 1000, 1e-5)
    assert epsilon(0.0, 0.01, 1, 1e-5) == math.inf
    assert epsilon(4.0, 1.0, 1, 1e-5) == pytest.approx(
        min(a / 32 + math.log(1e5) / (a - 1) for a in range(2, 65)), rel=1e-9
    )
    with pytest.raises(ValueError, match="share is 2"):
        epsilon(1.0, 2, 1, 1e-5)
