"""Projections keep scalar products; LESS takes Adam's live states and puts scores together as asked."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from resilin.objective.next_token import NextToken
from resilin.optim.adamw import AdamW
from resilin.optim.sgd import SGD
from resilin.steer.influence import adam_direction, adam_moments, projected, scores
from resilin.steer.less import LESS, learning_rate
from resilin.steer.projection import Projection, signs
from resilin.steer.sample_gradients import sample_gradients


def test_signs_are_a_function_of_the_coordinate_and_balanced() -> None:
    whole = signs(7, "a", 0, 300, 50)
    assert set(whole.unique().tolist()) == {-1.0, 1.0}
    assert torch.equal(signs(7, "a", 100, 200, 50), whole[100:200])
    assert not torch.equal(signs(7, "b", 0, 300, 50), whole)
    assert not torch.equal(signs(8, "a", 0, 300, 50), whole)
    assert abs(float(whole.mean())) < 4 / 15000**0.5


@pytest.mark.parametrize("dimensions", [64, 1024])
def test_projected_scalar_products_are_unbiased_with_error_of_one_over_root_dimensions(dimensions: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 400, generator=generator)
    y = 0.6 * x + 0.8 * y
    exact, size = float(x @ y), float(x.norm() * y.norm())
    found = []
    for seed in range(20):
        a, b = Projection(dimensions, seed)({"w": torch.stack((x, y)).view(2, 20, 20)})
        found.append(float(a @ b))
    errors = torch.tensor(found) - exact
    assert abs(float(errors.mean())) < 4 * size / (20 * dimensions) ** 0.5
    assert 0.5 < float(errors.std()) / (size / dimensions**0.5) < 2.0


def test_chunks_and_parts_do_not_change_a_projection(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = {"a": torch.randn(3, 7, 5), "b": torch.randn(3, 11)}
    whole = Projection(33, 1)(parts)
    monkeypatch.setattr("resilin.steer.projection._CHUNK", 33 * 4)
    torch.testing.assert_close(Projection(33, 1)(parts), whole)
    assert Projection(0, 1)(parts).shape == (3, 46)


def test_the_adam_direction_is_the_step_that_adam_takes_without_bias_correction(kit: Any) -> None:
    model, batch = kit.tiny_model(), kit.RowPool((4,)).read(range(4))
    optimizer = AdamW(lr=1e-2, weight_decay=0.0, betas=(0.9, 0.999)).build(model, 10)
    objective = NextToken().build()
    for step in range(3):
        optimizer.zero_grad()
        loss = objective(model, batch, None)
        (loss.sum / loss.units).backward()
        optimizer.step(step)
    moments = {name: (m.clone(), v.clone()) for name, (m, v) in
               adam_moments(optimizer, dict(model.named_parameters())).items()}  # fmt: skip
    one = batch.rows(2, 3)
    found = adam_direction(sample_gradients(model, objective, one), moments, (0.9, 0.999), 1e-8)
    optimizer.zero_grad()
    loss = objective(model, one, None)
    (loss.sum / loss.units).backward()
    optimizer.step(3)
    after = adam_moments(optimizer, moments)
    for name, (m, v) in after.items():
        torch.testing.assert_close(found[name][0], m / (v.sqrt() + 1e-8), rtol=1e-3, atol=1e-5)


def test_a_training_point_equal_to_a_target_point_has_the_best_score(kit: Any) -> None:
    pool = kit.RowPool((12, 12))
    target = kit.RowPool((0, 3))
    target.rows_NT = pool.rows_NT[[15]]
    target.pool_parts = (0, 1)
    look = kit.make_look(pool, 4, target=target)
    for aggregate in ("mean", "max", "subtask"):
        less = LESS(direction="sgd", aggregate=aggregate, dimensions=0)
        score_N = less.score(look, less.directions(look), less.target_gradients(look))
        assert float(score_N[15]) == pytest.approx(1.0, abs=1e-5)
        assert float(score_N.max()) <= float(score_N[15]) + 1e-5


def test_max_and_subtask_see_what_the_mean_averages_away() -> None:
    train = torch.tensor([[1.0, 0.0], [0.7, 0.7], [0.0, -1.0]])
    target = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.02]])
    assert int(scores(train, target, "max").argmax()) == 0
    assert int(scores(train, target, "mean").argmax()) == 1
    task = scores(train, target, "subtask", subtask_M=torch.tensor([0, 1, 1]))
    assert float(task[0]) == pytest.approx(1.0)
    assert float(task[1]) == pytest.approx(0.7071, abs=1e-3)


def test_centring_takes_away_what_all_directions_share() -> None:
    shared = torch.tensor([10.0, 0.0, 0.0])
    own = torch.tensor([[0.0, 1.0, 0.0], [0.0, -1.0, 0.0], [0.0, 0.0, 1.0], [0.0, 0.0, -1.0]])
    target = torch.tensor([[5.0, 0.0, -1.0]])
    plain, centred = scores(shared + own, target, "mean"), scores(shared + own, target, "mean", centred=True)
    assert float(plain.max() - plain.min()) < 0.05
    assert float(centred[3] - centred[2]) == pytest.approx(2 / 26**0.5, rel=1e-4)


def test_without_adam_the_adam_direction_is_refused(kit: Any) -> None:
    pool = kit.RowPool((8,))
    run = kit.make_run(pool)
    run.optimizer = SGD().build(run.model, 10)
    look = kit.make_look(pool, 4, target=kit.RowPool((2,)), run=run)
    with pytest.raises(ValueError, match=r"keeps momentum for 'embed.weight': train with AdamW, or set direction"):
        LESS(dimensions=8).select(look)
    assert len(LESS(direction="sgd", dimensions=8).select(look).samples) == 4


def test_memory_bounds_do_not_change_the_directions(kit: Any) -> None:
    look = kit.make_look(kit.RowPool((9,)), 4, batch_size=2)
    wide, narrow = (
        projected(look, look.batches(look.pool), Projection(16, 0), direction="sgd", memory=memory)
        for memory in (2**28, 1)
    )
    torch.testing.assert_close(wide, narrow)


def test_accumulated_scores_are_weighted_by_the_learning_rate(kit: Any) -> None:
    pool = kit.RowPool((8, 8))
    look = kit.make_look(pool, 4, target=kit.RowPool((2,)))
    less = LESS(direction="sgd", dimensions=0, accumulate=True)
    plain = less.score(look, less.directions(look), less.target_gradients(look))
    less.select(look)
    less.select(look)
    torch.testing.assert_close(look.memory["scores"], 2 * learning_rate(look) * plain)
    assert learning_rate(look) == pytest.approx(look.view.optimizer.lr * look.view.optimizer.schedule(0))
