"""The recipe nemotron-elastic: its settings, and its claims, which are computed from the runs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from nested_cases import decoder

from resilin.models.decoder_settings import DecoderSettings
from resilin.nested import Budget
from resilin.nouns import Batch
from resilin.recipes.cells import check
from resilin.recipes.findings import Evaluation, RunRecord, Study, Trial
from resilin.recipes.nemotron_elastic.analysis import analyse
from resilin.recipes.nemotron_elastic.runs import MEASURED, measured
from resilin.recipes.recipe import load_recipe

RECIPE = Path(__file__).parents[2] / "recipes" / "nemotron-elastic"
TARGETS = ("0.5", "0.75", "1")
GOOD = {
    "elastic": {"trained": (1.95, 1.90, 1.89), "kl": (0.04, 0.01, 0.004)},
    "random": {"trained": (2.0, 1.93, 1.89), "kl": (0.05, 0.02, 0.004)},
}


def study(**changed) -> Study:
    trials = []
    for arm, figures in GOOD.items():
        for seed in range(3):
            metrics = {"trained/parent/loss": 1.885}
            for number, target in enumerate(TARGETS):
                metrics[f"trained/{target}/loss"] = figures["trained"][number] + 0.001 * seed
                metrics[f"trained/{target}/kl"] = figures["kl"][number]
                metrics[f"trained/{target}/cost"] = float(target) * 1.01 if number < 2 else 1.0
                metrics[f"activation/{target}/loss"] = (2.1, 1.95, 1.885)[number]
                metrics[f"activation/{target}/kl"] = (0.14, 0.03, 0.0)[number]
                metrics[f"random/{target}/loss"] = (2.2, 1.99, 1.885)[number]
                metrics[f"random/{target}/kl"] = (0.21, 0.09, 0.0)[number]
            if arm == "elastic":
                metrics |= {name.replace("__", "/"): value for name, value in changed.items()}
            named = {f"{MEASURED}/{name}": value for name, value in metrics.items()}
            record = RunRecord(hash="x", status="finished", evaluations=(Evaluation(step=9, metrics=named),))
            trials.append(Trial("main", arm, {}, seed, record))
    return Study("nemotron-elastic", "cpu", tuple(trials), None)


def test_all_claims_hold_where_the_figures_say_so():
    found = analyse(study())
    assert {claim.name: claim.holds for claim in found.claims} == dict.fromkeys(
        (
            "ranking",
            "training, 0.5",
            "router, 0.5",
            "training, 0.75",
            "router, 0.75",
            "whole",
            "ranking lasts",
        ),
        True,
    )
    assert len(found.tables[0].rows) == 12
    assert len(found.plots[0].lines) == 4


@pytest.mark.parametrize(
    ("changed", "fails"),
    [
        ({"activation/0.5/kl": 0.2}, "ranking"),
        ({"trained/0.5/loss": 2.05}, "training, 0.5"),
        ({"trained/0.75/cost": 0.8}, "router, 0.75"),
        ({"trained/1/loss": 2.0}, "whole"),
        ({"trained/0.5/kl": 0.06}, "ranking lasts"),
        ({"trained/0.5/kl": None}, "ranking lasts"),
    ],
    ids=str,
)
def test_a_claim_fails_where_its_figures_do(changed, fails):
    found = analyse(study(**changed))
    assert fails in {claim.name for claim in found.claims if not claim.holds}


def test_runs_that_did_not_end_are_told():
    assert analyse(Study("nemotron-elastic", "cpu", (), None)).notes


def test_sub_models_are_measured_against_the_parent():
    settings = DecoderSettings(vocab_size=37, hidden_size=16, layers=2, heads=4, mlp_size=24, init_std=0.4)
    model = decoder(settings)
    tokens = torch.randint(37, (2, 8), generator=torch.Generator().manual_seed(0))
    batch = Batch(torch.arange(2), {"tokens": tokens, "labels": tokens.roll(-1, 1)})
    found = measured(model, {"1": Budget(), "0.5": Budget(ffn=12)}, model, iter([batch]))
    assert found["1/kl"] == pytest.approx(0, abs=1e-12)
    assert found["1/loss"] == pytest.approx(found["parent/loss"])
    assert found["0.5/kl"] > 0


def test_every_cell_of_every_preset_can_be_trained():
    check(load_recipe(RECIPE))
