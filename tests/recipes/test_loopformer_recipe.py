"""The recipe loopformer: its settings, and its claims, which are computed from the runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from resilin.recipes.cells import cells, check
from resilin.recipes.findings import Evaluation, RunRecord, Study, Trial
from resilin.recipes.loopformer import TITLES, analyse
from resilin.recipes.recipe import load_recipe

RECIPE = Path(__file__).parents[2] / "recipes" / "loopformer"
GOOD = {
    "loopformer": {"1": 2.1, "2": 1.9, "3": 1.8, "6": 1.7, "4+1+1": 1.85, "1+1+4": 1.9, "loss": 1.7},
    "base_loop": {"1": 4.0, "2": 2.7, "3": 2.1, "6": 1.72, "loss": 1.72},
    "early_exit": {"1": 2.2, "2": 2.0, "3": 1.9, "6": 1.8, "loss": 1.8},
    "told_alone": {"1": 3.8, "2": 2.6, "3": 2.0, "6": 1.7, "loss": 1.7},
    "unshared": {"1": 1.6, "loss": 1.6},
}


def study(**changed: dict[str, float]) -> Study:
    trials = []
    for arm, losses in {name: losses | changed.get(name, {}) for name, losses in GOOD.items()}.items():
        for seed in range(3):
            metrics = {name if name == "loss" else f"loss_at_{name}": v + 0.001 * seed for name, v in losses.items()}
            record = RunRecord(
                hash="x",
                status="finished",
                evaluations=(Evaluation(step=100, metrics=metrics),),
                series={"consistency_relative": tuple((step, 0.5 / step) for step in range(1, 101))},
                settings={"model": {"loop": {"times": 1 if arm == "unshared" else 6}}},
            )
            trials.append(Trial("main", arm, {}, seed, record))
    return Study("loopformer", "cpu", tuple(trials), None)


def holds(found) -> dict[str, bool]:
    return {claim.name: claim.holds for claim in found.claims}


def test_all_claims_hold_where_the_figures_say_so():
    found = analyse(study())
    assert all(holds(found).values())
    assert len(found.claims) == 8
    table = {row[0]: row for row in found.tables[0].rows}
    assert table[TITLES["unshared"]][-1] == pytest.approx(1.601)
    assert table[TITLES["loopformer"]][2] == pytest.approx(2.101)
    assert [len(plot.lines) for plot in found.plots] == [4, 2]


@pytest.mark.parametrize(
    ("changed", "fails"),
    [
        ({"loopformer": {"3": 1.95}}, {"every loop helps", "3 of 6 loops"}),
        ({"base_loop": {"1": 2.9}}, {"1 of 6 loops"}),
        ({"base_loop": {"6": 1.6}}, {"all loops"}),
        ({"told_alone": {"3": 1.7}}, {"short trajectories have to be trained"}),
        ({"early_exit": {"6": 1.6}}, {"early exits"}),
        ({"loopformer": {"4+1+1": 1.95}}, {"coarse early"}),
    ],
)
def test_a_claim_fails_where_its_figures_do(changed, fails):
    found = holds(analyse(study(**changed)))
    assert fails <= {name for name, held in found.items() if not held}


def test_runs_that_did_not_end_are_told():
    assert analyse(Study("loopformer", "cpu", (), None)).notes


def test_every_cell_of_every_preset_can_be_trained():
    recipe = load_recipe(RECIPE)
    check(recipe)
    arms = {cell.arm: cell.settings.model for cell in cells(recipe, "cpu")}
    assert arms["base_loop"].loop.condition == arms["early_exit"].loop.condition == "none"
    assert arms["loopformer"].loop == arms["told_alone"].loop
    assert arms["unshared"].layers == arms["loopformer"].loop.times
    assert len(arms["unshared"].trajectory) == 1
