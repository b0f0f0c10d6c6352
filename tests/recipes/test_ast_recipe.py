"""The analysis of the recipe `ast`: claims follow the numbers, both ways."""

from __future__ import annotations

from pathlib import Path

import pytest

from resilin.models.decoder_settings import DecoderSettings
from resilin.models.settings import ModelContext
from resilin.recipes.ast import TITLES, analyse
from resilin.recipes.cells import cells, check
from resilin.recipes.findings import Evaluation, RunRecord, Study, Trial
from resilin.recipes.recipe import load_recipe
from resilin.sparsity.masks import sparse_layers
from resilin.sparsity.settings import Sparse

FOLDER = Path(__file__).parents[2] / "recipes" / "ast"

AS_PUBLISHED = {"dense": 1.5, "fixed_ce": 1.62, "fixed_kd": 1.6, "moving": 1.61, "static": 1.57, "ast_ce": 1.58,
                "ast": 1.54, "ast_slorb": 1.52}  # fmt: skip


def record(first: float, last: float, flips: tuple[float, ...]) -> RunRecord:
    evaluations = (Evaluation(step=0, metrics={"nll": first}), Evaluation(step=30, metrics={"nll": last}))
    series = {}
    if flips:
        points = tuple((10 * (i + 1), rate) for i, rate in enumerate(flips))
        series = {"flip_rate": points, "initial_flip_rate": points}
    return RunRecord(hash="h", status="finished", evaluations=evaluations, series=series)


def study(final: dict[str, float], flips: dict[str, float], boosted_start: float = 1.8) -> Study:
    trials = []
    for arm, last in final.items():
        for seed in (0, 1, 2):
            first = 1.52 if arm == "dense" else boosted_start if arm == "ast_slorb" else 2.0
            rates = (0.02, flips[arm]) if arm in flips else ()
            noise = 0.001 * seed
            trials.append(Trial("main", arm, {}, seed, record(first + noise, last + noise, rates)))
    return Study("ast", "cpu", tuple(trials), None)


def holding(found: Study) -> dict[str, bool]:
    return {claim.name: claim.holds for claim in analyse(found).claims}


def test_numbers_as_published_hold_every_claim_and_reversed_ones_none() -> None:
    good = study(AS_PUBLISHED, {"ast": 0.001, "moving": 0.02})
    assert all(holding(good).values())
    assert len(analyse(good).plots[0].lines) == 5
    worst = {arm: 3.0 - loss for arm, loss in AS_PUBLISHED.items()} | {"fixed_ce": 2.2, "fixed_kd": 2.3, "ast": 2.5}
    bad = study(worst, {"ast": 0.05, "moving": 0.02}, boosted_start=2.4)
    claims = holding(bad)
    assert not any(claims[name] for name in claims if name != "ast_slorb < ast"), claims


@pytest.mark.parametrize(("ast", "holds"), [(1.56, True), (1.58, False)])
def test_near_dense_is_measured_from_the_dense_model_before(ast: float, holds: bool) -> None:
    assert holding(study({**AS_PUBLISHED, "ast": ast}, {}))["near dense"] is holds


def test_every_preset_s_runs_can_be_made_and_all_arms_share_one_dense_model() -> None:
    recipe = load_recipe(FOLDER)
    check(recipe)
    assert set(recipe.arms) == set(TITLES)
    dense = {str(cell.settings.model.model.run) for cell in cells(recipe, "cpu", seeds=(0,))}  # type: ignore[attr-defined]
    assert len(dense) == 1


@pytest.mark.parametrize("preset", ["cpu", "gpu", "paper"])
def test_the_dense_model_of_every_preset_takes_the_masks_and_corrections_of_every_arm(preset: str) -> None:
    for cell in cells(load_recipe(FOLDER), preset, seeds=(0,)):
        sparse = cell.settings.model
        assert isinstance(sparse, Sparse)
        dense = DecoderSettings(**{**sparse.model.run["model"], "vocab_size": 260, "layers": 1})  # type: ignore[attr-defined]
        model = sparse.model_copy(update={"model": dense}).build(ModelContext(0, None))
        assert all(layer.boost == sparse.slorb for _, layer in sparse_layers(model)), cell.arm
        assert (sparse.slorb is not None) == (cell.arm == "ast_slorb")
