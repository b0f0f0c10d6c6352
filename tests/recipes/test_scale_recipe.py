"""The recipe `scale`: its claims follow from the records and the simulation, whichever way these point."""

from __future__ import annotations

from pathlib import Path

import pytest

from resilin.recipes.cells import check
from resilin.recipes.findings import Evaluation, Findings, RunRecord, Study, Trial
from resilin.recipes.recipe import load_recipe
from resilin.recipes.scale import analysis
from resilin.recipes.scale.analysis import WAYS, Scale, analyse, long_run

FOLDER = Path(__file__).parents[2] / "recipes" / "scale"


def trial(arm: str, seed: int, weights: str, killed: int = 0) -> Trial:
    metrics = {"cluster/killed": float(killed), "cluster/recovery": 0.5} if killed else {}
    record = RunRecord(
        hash="x",
        status="finished",
        weights=weights,
        series={"loss": ((1, 2.0), (2, 1.0 + seed))},
        evaluations=(Evaluation(step=2, metrics=metrics),),
    )
    return Trial("main", arm, {}, seed, record)


def found(weights: str, monkeypatch: pytest.MonkeyPatch) -> Findings:
    monkeypatch.setattr(analysis, "RATES", (1.0,))
    monkeypatch.setattr(analysis, "SCALES", {"cpu": Scale((8, 16), 4.0, (0,))})
    trials = [trial("undisturbed", 0, "a"), trial("killed", 0, weights, 2)]
    return analyse(Study("scale", "cpu", tuple(trials), load_recipe(FOLDER)))


def test_every_cell_of_every_preset_can_be_run() -> None:
    recipe = load_recipe(FOLDER)
    check(recipe)
    assert set(recipe.presets) == set(analysis.SCALES) == {"cpu", "gpu", "paper"}


def test_claims_follow_from_what_was_found(monkeypatch: pytest.MonkeyPatch) -> None:
    good, bad = (found(weights, monkeypatch) for weights in ("a", "b"))
    claims = [{claim.name: claim for claim in one.claims} for one in (good, bad)]
    assert claims[0]["a kill loses nothing"].holds
    assert not claims[1]["a kill loses nothing"].holds
    assert "2 workers killed" in claims[0]["a kill loses nothing"].evidence
    assert set(claims[0]) - {"a kill loses nothing"} >= {"restarts are Daly's", "ElasWave and torchft", "the gap grows"}
    rows = {row.name: row.value for row in good.rows}
    for machines in (8, 16):
        values = {name: rows[f"simulated goodput, {8 * machines:,} workers, {name}"] for name in WAYS}
        assert all(value is not None and 0 < value < 1.01 for value in values.values())
    assert rows["measured: longest time from a kill to the next step, 4 workers"] == 0.5
    assert [plot.x_log for plot in good.plots] == [True, True]
    assert len(good.tables[0].rows) == 2 * len(WAYS)


def test_the_simulated_cluster_is_the_described_machine() -> None:
    settings = long_run(16, 1.0, 3, rate=2.0)
    assert settings.workers == 128
    assert settings.cluster.price > 0
    assert settings.failures.machine is not None
    assert settings.failures.machine.mean_hours * 2 == pytest.approx(50700 / 8)
    assert settings.checkpoint.restart_seconds == 1200
