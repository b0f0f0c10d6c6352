"""Selection by loss: the favoured class, the sliding window, and the corners where nothing is left of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from resilin.keys import Keys
from resilin.steer.draws import open_uniform, permutation, with_replacement, without_replacement
from resilin.steer.loss_band import DeltaLoss, LossBand


@pytest.mark.parametrize(
    ("focus", "favoured"), [("low", range(33)), ("medium", range(33, 66)), ("high", range(67, 100))]
)
def test_the_favoured_third_weighs_five_times_as_much(focus: Any, favoured: range) -> None:
    weights = LossBand(focus=focus).weights(torch.arange(100.0))
    assert {float(weights[n]) for n in favoured} == {5.0}
    assert int((weights == 5.0).sum()) in (33, 34)
    assert float(LossBand(focus=focus, temperature=2.0).weights(torch.arange(100.0)).max()) == pytest.approx(5**0.5)


def test_the_window_slides_from_the_start_to_the_end() -> None:
    delta = DeltaLoss()
    starts = [delta.window(1000, u, 9)[0] for u in range(1, 10)]
    assert starts == sorted(starts)
    assert len(set(starts)) == 9
    assert starts[0] < 0.01 * 1000
    assert delta.window(1000, 9, 9)[1] > 0.99 * 1000
    assert all(stop - start in (199, 200, 201) for start, stop in (delta.window(1000, u, 9) for u in range(1, 10)))


def test_one_update_divides_by_nothing() -> None:
    assert DeltaLoss().window(100, 1, 1) == DeltaLoss().window(100, 1, None) == DeltaLoss().window(100, 1, 5)
    assert DeltaLoss().window(1, 1, 1) == (0, 1)


def test_samples_in_the_window_weigh_more_and_the_window_ends_where_losses_rise() -> None:
    fallen = torch.linspace(1, -1, 100)[torch.randperm(100, generator=torch.Generator().manual_seed(0))]
    delta = DeltaLoss()
    first, last = delta.window(100, 2, 3)
    weights = delta.weights(fallen, 2, 3)
    inside = (weights == 1.0).nonzero()[:, 0]
    ranks = torch.argsort(torch.argsort(fallen, descending=True))
    assert sorted(ranks[inside].tolist()) == list(range(first, min(last, 50)))
    assert bool((fallen[inside] >= 0).all())


def test_an_empty_window_leaves_all_alike() -> None:
    weights = DeltaLoss().weights(torch.full((50,), -1.0), 3, 3)
    assert torch.equal(weights, torch.full((50,), 0.025, dtype=torch.float64))


def test_the_first_call_stores_the_losses_and_draws_at_random(kit: Any) -> None:
    pool = kit.RowPool((40,))
    look = kit.make_look(pool, 10)
    first = DeltaLoss().select(look)
    assert torch.equal(look.memory["initial"], look.losses(pool))
    assert torch.equal(torch.as_tensor(first.samples), permutation(look.keys("delta loss"), 40)[:10])
    second = DeltaLoss().select(look)
    assert second.metrics["mean fall of the loss"] == 0.0


def test_draws_follow_the_weights_and_never_repeat() -> None:
    weights = torch.tensor([0.0, 1.0, 2.0, 5.0])
    counts = torch.zeros(4)
    for seed in range(300):
        counts[without_replacement(Keys.of_step(seed, 0), weights, 1)] += 1
    torch.testing.assert_close(counts / 300, weights / 8, rtol=0, atol=0.12)
    both = torch.stack([without_replacement(Keys.of_step(seed, 0), weights, 3).sort().values for seed in range(20)])
    assert torch.equal(both, torch.tensor([[1, 2, 3]]).expand(20, 3))
    with pytest.raises(ValueError, match=r"4 samples are to be drawn, and only 3 have a probability above 0"):
        without_replacement(Keys.of_step(0, 0), weights, 4)
    with pytest.raises(ValueError, match=r"finite and not negative"):
        without_replacement(Keys.of_step(0, 0), torch.tensor([-1.0, 1.0]), 1)


def test_uniform_draws_stay_inside() -> None:
    drawn = open_uniform(Keys.of_step(0, 0), 10_000)
    assert 0 < float(drawn.min()) < float(drawn.max()) < 1
    assert sorted(permutation(Keys.of_step(0, 1), 100).tolist()) == list(range(100))
    many = with_replacement(Keys.of_step(0, 2), 7, 5000)
    assert torch.bincount(many, minlength=7).min() > 500
    assert len(torch.bincount(many)) == 7
