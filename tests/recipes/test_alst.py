"""The recipe `alst`: what is counted is what is alive, divided rows train the same, claims follow from the runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from resilin.keys import Keys
from resilin.models.decoder import Decoder
from resilin.models.decoder_settings import DecoderSettings
from resilin.nouns import Batch
from resilin.recipes.alst.alive import Alive
from resilin.recipes.alst.analysis import ARMS, BASELINE, analyse
from resilin.recipes.alst.counted import Counted
from resilin.recipes.findings import RunRecord, Study, Trial
from resilin.recipes.recipe import load_recipe

RECIPE = Path(__file__).parents[2] / "recipes" / "alst"


def test_what_is_alive_is_counted_and_what_is_freed_is_not():
    with Alive() as alive:
        x = torch.zeros(1000)
        y = x + 1
        assert alive.now == 8000
        view = y[10:]
        assert alive.now == 8000
        del x
        assert alive.now == 4000
        y.add_(1)
        del y
        assert alive.now == 4000  # the view holds it
        del view
        assert alive.now == 0
    assert alive.peak == 8000


def _step(ranks: int, kind: str = "ulysses") -> tuple[float, list[torch.Tensor], dict[str, float]]:
    settings = DecoderSettings(vocab_size=40, hidden_size=16, layers=2, heads=2, dropout=0.2, recompute="block")
    model, objective = Decoder(settings, seed=3), Counted(chunk=8, ranks=ranks, kind=kind).build()
    tokens = torch.arange(64).view(1, 64) * 7 % 40
    batch = Batch(torch.arange(1), {"tokens": tokens, "labels": (tokens + 7) % 40})
    for _ in range(2):  # the ranks take the weights of the second step too
        model.zero_grad()
        loss = objective(model, batch, Keys(1, 2, batch.slots_B))
        (loss.sum * 0.5).backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(parameter.grad, alpha=-0.01)
    return (
        float(loss.sum.detach()),
        [p.grad for p in model.parameters()],
        {n: log.value() for n, log in loss.logs.items()},
    )


@pytest.mark.parametrize("kind", ["ulysses", "ring"])
def test_rows_divided_over_processes_give_the_same_step_with_half_of_it_alive(kind: str):
    loss, gradients, bytes_ = _step(1)
    found, theirs, less = _step(2, kind)
    assert found == pytest.approx(loss, rel=1e-6)
    for a, b in zip(theirs, gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert less["kept_bytes"] < 0.7 * bytes_["kept_bytes"]
    assert less["peak_bytes"] < bytes_["peak_bytes"]


PEAKS = {"nothing": 400, BASELINE: 200, "loss": 80, "sp": 40, "sp_tiles": 20, "sp_offload": 39, "all": 19, "ring": 41}
KEPT = {"nothing": 300, BASELINE: 70, "loss": 10, "sp": 5, "sp_tiles": 5, "sp_offload": 4.75, "all": 4.75, "ring": 5}


def study(**changes: dict[str, Any]) -> Study:
    recipe = load_recipe(RECIPE)
    tree = recipe.settings | {"seed": 0}
    trials = []
    for arm in ARMS:
        patch, own = changes.get(arm, {}), dict(tree)
        own["objective"] = tree["objective"] | recipe.arms[arm].get("objective", {})
        series = {
            "loss": tuple((step, 5.0 - step / 10 + patch.get("gap", 0.0)) for step in (1, 2)),
            "kept_bytes": tuple((step, float(patch.get("kept", KEPT[arm]) * 2**20)) for step in (1, 2)),
            "peak_bytes": tuple((step, float(patch.get("peak", PEAKS[arm]) * 2**20)) for step in (1, 2)),
        }
        record = RunRecord(
            hash=arm, status="finished", evaluations=(), series=series, parameters=1, non_embedding=1,
            wall_seconds=1.0, data_digest="", code="", settings=own,
        )  # fmt: skip
        trials.append(Trial("main", arm, {}, 0, record))
    return Study("alst", "cpu", tuple(trials), recipe)


def test_all_claims_hold_when_every_part_saves_what_was_published():
    findings = analyse(study())
    assert len(findings.claims) == 6
    assert all(claim.holds for claim in findings.claims)
    assert len(findings.tables[0].rows) == len(ARMS)


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"sp": {"gap": 1e-3}}, "the same losses"),
        ({"all": {"peak": 41}}, "each part makes a step smaller"),
        ({"loss": {"kept": 25}}, "loss in chunks"),
        ({"sp": {"kept": 7}}, "rows divided over ranks"),
        ({"sp_tiles": {"peak": 45}}, "tiles"),
        ({"sp_offload": {"kept": 4.5}}, "checkpoints away"),
    ],
)
def test_each_claim_falls_with_its_runs(changes: dict[str, dict[str, float]], name: str):
    held = {claim.name: claim.holds for claim in analyse(study(**changes)).claims}
    assert not held[name]
