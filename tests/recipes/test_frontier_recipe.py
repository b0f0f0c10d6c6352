"""The recipe `frontier`: claims follow from studies and records, whichever way these point."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from resilin.recipes.cells import check
from resilin.recipes.findings import RunRecord, Study, Trial
from resilin.recipes.frontier import analysis, curves, machine, searches
from resilin.recipes.frontier.measured import Measured, influence, measured, picked, short
from resilin.recipes.frontier.searches import Searched
from resilin.recipes.recipe import load_recipe

FOLDER = Path(__file__).parents[2] / "recipes" / "frontier"


def test_every_cell_of_every_preset_can_be_run() -> None:
    recipe = load_recipe(FOLDER)
    check(recipe)
    assert set(recipe.presets) == set(analysis.SCALES) == {"cpu", "gpu", "paper"}
    assert len(recipe.arms) == 12


@pytest.mark.slow
def test_layouts_on_paper_are_as_many_as_was_asked_and_most_do_not_fit() -> None:
    steps = machine.layouts()
    assert 1800 <= len(steps) <= 2200
    assert len({machine._key(step.plan) for step in steps}) == len(steps)
    for step in steps:
        d = step.plan.degrees
        assert d.workers == machine.WORKERS
        assert machine.ROWS % (d.data * step.plan.micro) == 0
        assert machine.workload().model.layers % (d.pipeline * step.plan.parallel.chunks) == 0
    fits = [step for step in steps if machine.needed(step) <= machine.limit()]
    assert 50 < len(fits) < len(steps) / 2
    assert machine.best_rate() == max(machine.rate(step) for step in fits)


@pytest.mark.slow
def test_a_trial_differs_by_noise_and_a_wrong_cost_model_by_choices() -> None:
    step = next(one for one in machine.layouts() if machine.needed(one) <= machine.limit())
    found = [machine.Machine(seed).run(step).rate for seed in range(30)]
    assert len(set(found)) == 30
    assert sum(found) / 30 == pytest.approx(machine.rate(step), rel=0.02)
    assert machine.rate(step, wrong=True) != pytest.approx(machine.rate(step), rel=0.001)
    large = next(one for one in machine.layouts() if machine.needed(one) > machine.limit())
    assert machine.Machine(0).run(large).status == "oom"


@pytest.mark.slow
def test_a_short_search_ends_with_what_it_saw() -> None:
    found = searches.searched("chance", 0, 12)
    assert len(found.regret) == len(found.failed) == 12
    assert all(0 <= value <= 1 for value in found.regret)
    assert found.failing(0) == sum(found.failed[:4]) / 4


def faked(regret: float, early: int, late: int, ranks: tuple[str, ...]) -> Searched:
    failed = [True] * early + [False] * (40 - early) + [True] * late + [False] * (20 - late)
    return Searched((regret,) * 60, tuple(failed), ranks)


@pytest.mark.parametrize("good", [True, False])
def test_claims_of_searches_follow_from_them(good: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = ("micro", "tensor", "sharding") if good else ("micro", "sharding", "tensor")
    ours, theirs = faked(0.0 if good else 0.3, 10, 5 if good else 6, ranks), faked(0.1, 10, 10, ())
    monkeypatch.setattr(analysis, "searched", lambda kind, seed: ours if kind in ("trees", "hybrid") else theirs)
    claims = analysis.search_claims(analysis.Scale((0, 1), ("trees", "chance")))
    assert [claim.holds for claim in claims] == [good] * 4
    assert "2 of 2 seeds" in claims[0].evidence if good else "0 of 2 seeds" in claims[0].evidence


def test_the_cost_model_has_the_directions_of_the_paper() -> None:
    assert all(claim.holds for claim in analysis.direction_claims()), [
        claim.evidence for claim in analysis.direction_claims() if not claim.holds
    ]


def test_the_bubble_alone_is_that_of_the_arithmetic() -> None:
    for name, (tensor, pipeline, micros, most) in curves.REPLICAS.items():
        dies, share, alone = curves.strong(name)[-1]
        assert dies <= most
        assert dies % (tensor * pipeline) == 0
        assert share <= alone < 1
        assert curves.weak(name)[0] == (tensor * pipeline, 1.0)
        assert micros > pipeline


def trial(arm: str, seed: int, seconds: float, parallel: dict[str, Any], micro: int = 8) -> Trial:
    settings = {
        "model": {
            "stretches": [{"until": 9, "parallel": {"workers": 2, **parallel}}],
            "recompute": "none",
            "hidden_size": 64,
            "layers": 4,
            "heads": 4,
            "mlp_size": 172,
        },
        "train": {"micro_batch_size": micro, "batch_size": 16},
        "source": {"sequence_length": 64},
        "precision": {"compute": "fp32"},
    }
    series = {"seconds": ((1, 99.0), *((step, seconds) for step in range(6, 12)))}
    return Trial("main", arm, {}, seed, RunRecord(hash="x", status="finished", series=series, settings=settings))


def real(times: dict[str, float]) -> Measured:
    layouts: dict[str, tuple[dict[str, Any], int]] = {
        "data_2": ({"data": 2}, 8),
        "data_2_micro_1": ({"data": 2}, 1),
        "tensor_2": ({"data": 1, "tensor": 2}, 8),
        "tensor_2_micro_1": ({"data": 1, "tensor": 2}, 1),
        "stages_2": ({"data": 1, "pipeline": 2}, 2),
        "stages_2_micro_8": ({"data": 1, "pipeline": 2}, 8),
    }
    trials = tuple(
        trial(arm, seed, times.get(arm, 2.0), parallel, micro)
        for arm, (parallel, micro) in layouts.items()
        for seed in (0, 1)
    )
    found = measured(Study("frontier", "cpu", trials, load_recipe(FOLDER)))
    assert found is not None
    return found


def test_claims_of_real_runs_follow_from_their_times() -> None:
    good = real({"data_2": 1.0})
    assert good.middle["data_2"] == pytest.approx(16 * 64)
    assert picked(good, 0).runs == 3
    assert picked(good, 0).short == short(good, "data_2") == 0
    assert short(good, "stages_2") == pytest.approx(0.5)
    assert all(claim.holds for claim in analysis.real_claims(good))
    # The layout that the cost model expects least of is the best by far: half of the runs miss it.
    bad = real({"tensor_2_micro_1": 0.1})
    held = {claim.name: claim.holds for claim in analysis.real_claims(bad)}
    assert held["half of the runs do"] is (picked(bad, 0).short <= 0.05 and picked(bad, 1).short <= 0.05)
    assert picked(bad, 0, chance=True).runs == 3
    assert set(influence(good)) >= {"tensor", "micro", "pipeline"}
    assert measured(Study("frontier", "cpu", (), load_recipe(FOLDER))) is None
