"""The recipe `matformer`: claims follow the numbers, both ways; its runner measures what the analysis reads."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from resilin.nested import Budget
from resilin.nested.consistency import consistency
from resilin.recipes.cells import cells, check
from resilin.recipes.findings import Evaluation, RunRecord, Study, Trial
from resilin.recipes.matformer.analysis import ALONE, SIZES, analyse
from resilin.recipes.matformer.family import BATCHES, measured_alone, train_family
from resilin.recipes.recipe import load_recipe

FOLDER = Path(__file__).parents[2] / "recipes" / "matformer"
PARAMETERS = dict(zip(SIZES, (100.0, 140.0, 220.0, 380.0), strict=True))
MIXTURE = 180.0


def record(metrics: dict[str, float]) -> RunRecord:
    told = {f"family/{name}": value for name, value in metrics.items()}
    return RunRecord(hash="h", status="finished", evaluations=(Evaluation(step=1, metrics=told),))


def family(losses: tuple[float, ...], agreement: float, mixture: float, falling: float, skewed: float) -> RunRecord:
    metrics = {}
    for size, loss in zip(SIZES, losses, strict=True):
        metrics |= {f"{size}/loss": loss, f"{size}/agreement": agreement, f"{size}/kl": 0.1}
        metrics[f"{size}/parameters"] = PARAMETERS[size]
    name = "0.25 x2, 0.5 x2"
    metrics |= {f"{name}/loss": mixture, f"{name}/parameters": MIXTURE, "skewed/loss": skewed}
    metrics["falling: 0.5 x2, 0.25 x2/loss"] = falling
    return record(metrics)


def study(arms: dict[str, RunRecord]) -> Study:
    trials = [Trial("main", arm, {}, seed, one) for arm, one in arms.items() for seed in (0, 1, 2)]
    return Study("matformer", "cpu", tuple(trials), None)


def alone(loss: float, agreement: float) -> RunRecord:
    return record({"alone/loss": loss, "alone/agreement": agreement, "alone/kl": 0.2, "alone/parameters": 100.0})


def arms(*, nested: RunRecord, others: float, small: tuple[float, float]) -> dict[str, RunRecord]:
    found = {"nested": nested}
    for arm in ("per_layer", "joint", "plain", "plain_long"):
        found[arm] = family((2.0 + others, 1.9 + others, 1.8 + others, 1.7 + others), 0.5, 1.85, 1.9, 1.9)
    found["large"] = family((2.1, 1.9, 1.8, 1.69), 0.8, 1.85, 1.9, 1.9)
    return found | {arm: alone(*small) for arm in ALONE.values()}


def holding(found: Study) -> dict[str, bool]:
    return {claim.name: claim.holds for claim in analyse(found).claims}


def test_numbers_as_published_hold_every_claim_and_reversed_ones_none() -> None:
    good = family((2.0, 1.9, 1.8, 1.7), 0.9, 1.84, 1.86, 1.95)
    claims = holding(study(arms(nested=good, others=0.05, small=(2.1, 0.6))))
    assert all(claims.values()), claims
    bad = family((2.5, 2.45, 2.4, 2.0), 0.3, 2.9, 2.8, 2.7)
    worse = arms(nested=bad, others=-0.5, small=(1.5, 0.6)) | {"large": family((3.0,) * 4, 0.1, 3.0, 3.0, 3.0)}
    claims = holding(study(worse))
    assert not any(claims.values()), claims


def test_seeds_that_did_not_finish_hold_nothing() -> None:
    empty = RunRecord(hash="h", status="non-finite", stopped_at=3)
    findings = analyse(study(dict.fromkeys(("nested", "plain"), empty)))
    assert not any(claim.holds for claim in findings.claims)


def test_every_preset_is_one_that_can_be_run() -> None:
    recipe = load_recipe(FOLDER)
    check(recipe)
    for preset in recipe.presets:
        by_arm = {cell.arm: cell.settings.train.steps for cell in cells(recipe, preset)}
        assert by_arm["nested"] == 4 * by_arm["plain"] == 4 * by_arm["joint"]


@pytest.mark.parametrize("arm", ["nested", "alone_eighth"])
def test_the_runner_leaves_what_the_analysis_reads(arm: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("resilin.recipes.matformer.family.BATCHES", 2)
    small = ["train.steps=3", "evaluation.every=3", "evaluation.batches=1", "source.bytes=60000", "model.layers=2"]
    if arm.startswith("alone"):
        small += ["objective.whole.run.train.steps=3", "objective.whole.run.source.bytes=60000"]
        small += ["objective.whole.run.model.layers=2"]
    recipe = load_recipe(FOLDER)
    recipe = recipe.model_copy(update={"arms": {arm: recipe.arms[arm]}})
    (cell,) = cells(recipe, "cpu", seeds=[0], overrides=small)
    settings = cell.settings
    run, outcome = train_family(settings, tmp_path / "run", ())
    assert outcome.reason == "completed"
    events = (tmp_path / "run" / "events.jsonl").read_text()
    if arm == "nested":
        assert all(f'"{size}/loss"' in events for size in SIZES)
        assert '"falling: 0.5 x1, 0.25 x1/loss"' in events
        assert '"skewed/kl"' in events
    else:
        assert '"alone/agreement"' in events
        source = run.validation["validation"]
        batches = [source.fetch(step, range(source.slots(step))) for step in range(min(2, len(source)))]  # type: ignore[arg-type]
        itself = measured_alone(run, run.model)  # type: ignore[arg-type]
        (told,) = consistency(run.model, [Budget()], batches)
        assert itself["alone/loss"] == pytest.approx(told.loss, rel=1e-5)
        assert itself["alone/agreement"] == 1.0
        assert itself["alone/kl"] == pytest.approx(0.0, abs=1e-9)
    assert BATCHES > 2
