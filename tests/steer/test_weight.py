"""Weights: what each strategy gives, that micro-batches do not matter, and DoReMi's corners."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from resilin.keys import Keys
from resilin.models.settings import ModelContext, ModelSettings
from resilin.nouns import Batch, Loss
from resilin.objective.next_token import NextToken
from resilin.objective.settings import ObjectiveContext
from resilin.steer.adapt import Adapt, anchor_weights
from resilin.steer.doremi import DoReMi, excess, next_alpha
from resilin.steer.loss_weights import LossWeights, loss_weights
from resilin.steer.mix import Mixed
from resilin.steer.weight import Weighted, WeightedLoss
from resilin.steer.weighter import StepLook, Weighter, WeightError, checked_weights

STRATEGIES = ("linupper", "uniform", "quadratic", "extremes", "identity")


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_equal_losses_weigh_the_same_and_the_loss_is_the_mean(strategy: Any) -> None:
    losses = torch.full((5,), 2.5)
    weights = loss_weights(losses, strategy)
    torch.testing.assert_close(weights, torch.full((5,), 0.2))
    assert float((weights * losses).sum()) == pytest.approx(2.5)


def test_each_strategy_favours_what_it_says() -> None:
    losses = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])  # n = -1, -0.5, 0, 0.5, 1
    for strategy, value in {
        "linupper": [0.0, 0.5, 1.0, 1.0, 1.0],
        "quadratic": [0.0, 0.75, 1.0, 0.75, 0.0],
        "extremes": [1.0, 0.5, 0.0, 0.5, 1.0],
        "identity": [-1.0, -0.5, 0.0, 0.5, 1.0],
        "uniform": [0.0] * 5,
    }.items():
        expected = (torch.tensor(value) / 0.7).softmax(0)
        torch.testing.assert_close(loss_weights(losses, strategy, r=0.7), expected)  # type: ignore[arg-type]


def test_adapt_with_an_infinite_temperature_is_half_the_sum(kit: Any) -> None:
    samples, anchors = torch.randn(6, 4), torch.randn(3, 4)
    losses = torch.rand(6)
    weights = anchor_weights(samples, anchors, 1e9)
    assert float((weights * losses).sum()) == pytest.approx(0.5 * float(losses.sum()), rel=1e-5)
    assert float(anchor_weights(anchors[:1], anchors[:1], 0.1)) == pytest.approx(1 / (1 + 2.718281828**-10))


def objective(kit: Any, weighter: Weighter, folder: Path | None = None, **more: Any) -> WeightedLoss:
    context = ObjectiveContext(0, torch.device("cpu"), kit.RowPool((4,)), kit.tiny_model, folder)
    return Weighted(weighter=weighter, **more).build(context)


def weighed(kit: Any, micro: int, weighter: Weighter, **more: Any) -> tuple[dict[str, torch.Tensor], float]:
    pool = kit.RowPool((20, 20))
    run = kit.make_run(pool, objective(kit, weighter, **more), steps=2, micro_batch_size=micro)
    run.train()
    return kit.copied(run.model.state_dict()), run.metrics["loss"]


class Ramp(Weighter):
    def weights(self, look: StepLook) -> torch.Tensor:
        return torch.arange(len(look.batch)) + 0.5


@pytest.mark.parametrize("more", [{}, {"reduce": "sum"}], ids=["mean", "sum"])
def test_micro_batches_train_with_the_weights_of_the_whole_batch(kit: Any, more: dict[str, Any]) -> None:
    whole, loss = weighed(kit, 4, LossWeights(strategy="extremes"), **more)
    parts, again = weighed(kit, 1, LossWeights(strategy="extremes"), **more)
    assert loss == pytest.approx(again, rel=1e-5)
    for name, value in whole.items():
        torch.testing.assert_close(value, parts[name], rtol=1e-3, atol=1e-4)


def test_the_weighted_loss_by_hand(kit: Any) -> None:
    pool = kit.RowPool((8,))
    for reduce in ("mean", "sum"):
        weighted = objective(kit, Ramp(), reduce=reduce)
        run = kit.make_run(pool, weighted)
        weighted.before_step(run._view())
        batch = pool.fetch(0, range(4))
        batch["labels"][2, 3:] = -100  # a shorter sample counts by its mean
        plain = NextToken().build()
        alone = [plain(run.model, batch.rows(row, row + 1), None) for row in range(4)]
        means = torch.tensor([float(loss.sum.detach() / loss.units) for loss in alone])
        weights = torch.arange(4) + 0.5
        found = weighted(run.model, batch, Keys(0, 0, batch.slots_B))
        divisor = float(weights.sum()) if reduce == "mean" else 1.0
        assert float(found.units) == pytest.approx(divisor)
        assert float(found.sum.detach() / found.units) == pytest.approx(
            float((weights * means).sum()) / divisor, rel=1e-5
        )
        held = weighted(run.model, batch, None)
        assert float(held.sum.detach()) == pytest.approx(float(plain(run.model, batch, None).sum.detach()))


class PerRow:
    """An objective that knows no weights."""

    def __call__(self, model: Any, batch: Batch, keys: Any) -> Loss:
        hidden = model(batch["tokens"]).hidden_BTD
        return Loss((hidden * hidden.roll(1, -1)).sum() + 3 * len(batch), torch.tensor(2.0 * len(batch)))

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        return None


def test_any_other_objective_is_weighted_sample_by_sample(kit: Any) -> None:
    pool = kit.RowPool((8,))
    context = ObjectiveContext(0, torch.device("cpu"), pool, kit.tiny_model)
    weighted = WeightedLoss(PerRow(), Weighted(weighter=Ramp()), context)
    run = kit.make_run(pool, weighted)
    weighted.before_step(run._view())
    batch = pool.fetch(0, range(4))
    found = weighted(run.model, batch, Keys(0, 0, batch.slots_B))
    each = [PerRow()(run.model, batch.rows(row, row + 1), None) for row in range(4)]
    expected = sum((row + 0.5) * float(loss.sum.detach() / loss.units) for row, loss in enumerate(each))
    assert float(found.sum.detach()) == pytest.approx(expected, rel=1e-5)
    assert float(found.units) == 8.0


def test_warm_up_is_the_plain_objective(kit: Any) -> None:
    weighted = objective(kit, Ramp(), warmup_steps=2)
    run = kit.make_run(kit.RowPool((8,)), weighted, steps=3)
    logged: list[bool] = []
    run.listeners = [lambda event: logged.append("weight/mean" in event.logs) if hasattr(event, "logs") else None]
    run.train()
    assert logged == [False, False, True]


@pytest.mark.parametrize("bad", [[1.0], [-1.0, 1.0], [0.0, 0.0], [float("inf"), 1.0]])
def test_impossible_weights_are_refused(bad: list[float]) -> None:
    with pytest.raises(WeightError, match=r"weighter X gave weights"):
        checked_weights(torch.tensor(bad), 2, "weighter X")


def test_adapt_refreshes_its_anchors_and_resumes_between(kit: Any) -> None:
    def build() -> Any:
        weighter = Adapt(anchors=kit.Rows(parts=(5,)), count=3, refresh_steps=3, tau=0.2)
        return kit.make_run(kit.RowPool((8, 8)), objective(kit, weighter))

    kit.check_resume(build, 6, cuts=(2, 4))
    run = build()
    run.pace = run.pace.__class__(steps=2, micro_batch_size=0, clip_norm=1.0)
    run.train()
    old = run.objective._memory["anchors"].clone()
    run.pace = run.pace.__class__(steps=4, micro_batch_size=0, clip_norm=1.0)
    run.train()
    assert old.shape == (3, 16)
    assert not torch.equal(old, run.objective._memory["anchors"])


# -- DoReMi ---------------------------------------------------------------------------------------------------------


class SameModel(ModelSettings):
    """A reference that is (or is not) the model under training."""

    seed: int = 0

    def build(self, context: ModelContext) -> Any:
        from resilin.models.decoder_settings import DecoderSettings

        return DecoderSettings(vocab_size=16, hidden_size=16, layers=1, heads=2, mlp_size=24).build(
            ModelContext(self.seed, None)
        )


UNIFORM = torch.full((3,), 1 / 3, dtype=torch.float64)
STEP = {"centred": False, "clip": None}


def test_alpha_stays_uniform_without_a_step_or_without_an_excess() -> None:
    tokens = torch.tensor([5.0, 5.0, 0.0])
    for eta, lam in ((0.0, [3.0, 1.0, 0.0]), (0.5, [0.0, 0.0, 0.0])):
        moved = next_alpha(UNIFORM, torch.tensor(lam, dtype=torch.float64), tokens, eta=eta, c=0.1, **STEP)
        torch.testing.assert_close(moved, UNIFORM)


@pytest.mark.parametrize("centred", [False, True])
def test_alpha_sums_to_one_with_a_floor_and_grows_with_the_excess(centred: bool) -> None:
    alpha, tokens = UNIFORM, torch.tensor([5.0, 5.0, 5.0])
    lam = torch.tensor([2.0, 0.5, 0.0], dtype=torch.float64)
    for _ in range(200):
        alpha = next_alpha(alpha, lam, tokens, eta=1.0, c=0.03, centred=centred, clip=5.0 if centred else None)
        assert float(alpha.sum()) == pytest.approx(1)
        assert float(alpha.min()) >= 0.03 / 3 - 1e-12
    assert float(alpha[0]) > 0.9


def test_a_domain_that_is_absent_changes_only_by_normalisation() -> None:
    alpha = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    proxy, reference = torch.tensor([[2.0, 3.0], [1.0, 1.0]]), torch.tensor([[1.0, 5.0], [0.5, 0.5]])
    valid, domains = torch.tensor([[True, True], [True, False]]), torch.tensor([0, 1])
    lam, tokens = excess(proxy, reference, valid, domains, 3)
    assert lam.tolist() == [0.5, 0.5, 0.0]  # clipped at 0 token by token; masked tokens do not count
    assert tokens.tolist() == [2.0, 1.0, 0.0]
    moved = next_alpha(alpha, lam, tokens, eta=1.0, c=0.0, **STEP)
    raw = alpha * torch.tensor([2.718281828**0.5, 2.718281828**0.5, 1.0], dtype=torch.float64)
    torch.testing.assert_close(moved, raw / raw.sum())
    centred = next_alpha(alpha, lam, tokens, eta=1.0, c=0.0, centred=True, clip=5.0)
    torch.testing.assert_close(centred, alpha)  # both present domains have the mean excess, the absent one keeps 0


def doremi_run(kit: Any, folder: Path | None = None, **more: Any) -> Any:
    from resilin.data.settings import SourceContext

    domains = {name: kit.Rows(parts=(12,), seed=number) for number, name in enumerate("ab")}
    source = Mixed(domains=domains, update_steps=2).build(SourceContext(0, "train", 4))
    weighter = DoReMi(**{"reference": SameModel(seed=0), "eta": 1.0, "c": 0.1} | more)
    return kit.make_run(source, objective(kit, weighter, folder))


def test_a_proxy_equal_to_its_reference_keeps_uniform_weights(kit: Any) -> None:
    run = doremi_run(kit)
    run.source.before_step(run._view())
    run.objective.before_step(run._view())
    assert run.objective._memory["alpha"].tolist() == [0.5, 0.5]


def test_the_proxy_run_writes_the_mean_alpha_and_resumes(kit: Any, tmp_path: Path) -> None:
    kit.check_resume(lambda: doremi_run(kit, reference=SameModel(seed=3)), 6, cuts=(1, 3))
    run = doremi_run(kit, tmp_path, reference=SameModel(seed=3))
    alphas: list[float] = []
    run.listeners = [lambda event: alphas.append(event.logs["alpha/a"]) if hasattr(event, "logs") else None]
    run.pace = run.pace.__class__(steps=5, micro_batch_size=2, clip_norm=1.0)
    run.train()
    written = json.loads((tmp_path / "doremi.json").read_text())
    assert written["weights"]["a"] == pytest.approx(sum(alphas) / 5)
    assert sum(written["weights"].values()) == pytest.approx(1)
    assert len((tmp_path / "doremi.jsonl").read_text().splitlines()) == 5
    assert len(set(alphas)) > 1
    assert run.source.proportions == {"a": 0.5, "b": 0.5}  # only the loss is weighted, never the sampling too


def test_doremi_needs_domains(kit: Any) -> None:
    with pytest.raises(WeightError, match=r"needs batches of several named domains"):
        kit.make_run(kit.RowPool((8,)), objective(kit, DoReMi(reference=SameModel())), steps=1).train()
