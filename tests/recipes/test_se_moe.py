"""The recipe's runs, and claims that follow from records."""

from __future__ import annotations

from pathlib import Path

from resilin.recipes.cells import cells
from resilin.recipes.findings import RunRecord, Study, Trial
from resilin.recipes.recipe import load_recipe
from resilin.recipes.se_moe.analysis import ARMS, analyse

RECIPE = Path(__file__).parents[2] / "recipes" / "se-moe"


def test_every_preset_makes_runs():
    recipe = load_recipe(RECIPE)
    for preset in ("cpu", "gpu", "paper"):
        found = {cell.arm: cell.settings.memory.experts for cell in cells(recipe, preset)}
        assert set(found) == set(ARMS)
        assert [arm for arm, tiers in found.items() if tiers is None] == ["resident"]


def record(arm: str, step_s: float, stall_s: float, loss: float = 1.0, host: float = 8000.0) -> Trial:
    steps = range(1, 9)
    series = {
        "loss": tuple((step, loss / step) for step in steps),
        "seconds": tuple((step, step_s) for step in steps),
        "experts/stall_s": tuple((step, stall_s) for step in steps),
        "experts/hit_rate": ((8, 0.5 if arm == "off" else 0.4),),
        **{f"experts/{tier}_bytes": ((8, host),) for tier in ("host", "gradient", "device")},
        "experts/active": ((8, 0.25),),
    }
    moe = {"experts": 4, "expert_size": 16, "dense_layers": [0]}
    settings = {"model": {"layers": 3, "gated": True, "hidden_size": 8, "moe": moe}}  # 3,072 parameters
    return Trial("main", arm, {}, 0, RunRecord(hash=arm, status="finished", series=series, settings=settings))


def study(ahead: float = 0.7, loss: float = 1.0, host: float = 8000.0) -> Study:
    trials = [
        record("resident", 0.4, 0.0),
        record("memory", 0.5, 0.0),
        record("off", 1.0, 0.5),
        record("ahead", ahead, 0.2, loss),
    ]
    trials += [record("off_lru", 1.0, 0.4), record("ahead_lru", 0.7, 0.1, host=host)]
    return Study("se-moe", "cpu", tuple(trials), load_recipe(RECIPE))


def test_claims_follow_from_the_runs():
    held = {claim.name: claim.holds for claim in analyse(study()).claims}
    assert all(held.values())
    assert not {c.name: c.holds for c in analyse(study(ahead=0.9)).claims}["steps are shorter"]
    changed = {claim.name: claim.holds for claim in analyse(study(loss=1.0001)).claims}
    assert not changed["tiers change nothing"]
    large = {claim.name: claim.holds for claim in analyse(study(host=8193.0)).claims}  # thrice, of 16 x 3,072 bytes
    assert [name for name, holds in large.items() if not holds] == ["less memory"]
