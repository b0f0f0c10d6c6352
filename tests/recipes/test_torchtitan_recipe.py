"""Runs in stretches: other workers go on to the bit, a lost optimizer state does not; claims follow from the runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from resilin.config import UserError, parse_settings
from resilin.models.digest import weights_digest
from resilin.recipes.cells import cells
from resilin.recipes.findings import Evaluation, RunRecord, Study, Trial
from resilin.recipes.megatron_ptdp.analysis import analyse as analyse_megatron
from resilin.recipes.recipe import load_recipe
from resilin.recipes.torchtitan.analysis import analyse
from resilin.recipes.torchtitan.stretches import forget_moments, train_in_stretches
from resilin.run.settings import RunSettings

RECIPES = Path(__file__).parents[2] / "recipes"
TWO = {"workers": 2, "data": 2}


def settings(text: Path, stretches: list[dict[str, Any]]) -> RunSettings:
    tree = {
        "source": {
            "paths": [str(text)], "sequence_length": 16, "tokenizer": {"kind": "bytes"}, "held_out": {"by": "tail"},
        },
        "model": {
            "use": "resilin.recipes.torchtitan.stretches:StretchedDecoder", "hidden_size": 16, "layers": 2, "heads": 2,
            "mlp_size": 24, "stretches": stretches,
        },
        "optimizer": {"lr": 1e-2, "schedule": {"use": "resilin.optim.schedule:Constant", "warmup": 1}},
        "train": {"steps": 4, "batch_size": 4, "micro_batch_size": 1, "threads": 1, "device": "cpu"},
        "precision": {"compute": "fp32"},
        "evaluation": {"every": 0},
        "checkpoint": {"every": 0},
        "log": {"tensorboard": False, "live": False},
    }  # fmt: skip
    return parse_settings(RunSettings, tree, "test")


@pytest.mark.slow
def test_workers_go_on_to_the_bit_unless_the_state_is_lost(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("It was the best of times, it was the worst of times. " * 200)
    digests = []
    for name, stretches in {
        "alone": [],
        "two": [{"until": 2}, {"until": 4, "parallel": TWO}],
        "lost": [{"until": 2}, {"until": 4, "forget": True}],
    }.items():
        run, outcome = train_in_stretches(settings(text, stretches), tmp_path / name, ())
        assert (outcome.reason, run.step) == ("completed", 4)
        digests.append(weights_digest(run.model))
    assert digests[0] == digests[1] != digests[2]


def test_a_stretch_that_fails_says_why(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="until step 2 ended with exit code"):
        train_in_stretches(settings(tmp_path / "nothing.txt", [{"until": 2}]), tmp_path / "run", ())
    with pytest.raises(UserError, match="no checkpoint"):
        forget_moments(tmp_path / "checkpoints")


def record(weights: str, loss: float, bump: float, stretches: list[dict[str, int]]) -> RunRecord:
    series = tuple((step, 3.0 + (bump if step > 100 else 0.0)) for step in range(1, 201))
    return RunRecord(
        hash="0", status="finished", series={"loss": series}, weights=weights,
        evaluations=(Evaluation(step=200, metrics={"loss": loss}),), settings={"model": {"stretches": stretches}},
    )  # fmt: skip


def study(**arms: tuple[str, float, float]) -> Study:
    changed = [{"until": 100}, {"until": 200}]
    trials = [
        Trial("main", arm, {}, 0, record(*what, [] if arm == "uninterrupted" else changed))
        for arm, what in arms.items()
    ]
    return Study("torchtitan", "cpu", tuple(trials), None)


def test_claims_follow_from_the_runs() -> None:
    good = {
        "uninterrupted": ("a", 2.0, 0.0), "layouts": ("b", 2.001, 1e-6), "exact": ("a", 2.0, 0.0),
        "kept_local_batch": ("c", 2.2, 0.0), "lost_state": ("d", 2.0, 0.1),
    }  # fmt: skip
    assert [claim.holds for claim in analyse(study(**good)).claims] == [True] * 5
    bad = {
        "uninterrupted": ("a", 2.0, 0.0), "layouts": ("b", 2.02, 0.2), "exact": ("b", 1.9, 0.0),
        "kept_local_batch": ("c", 2.0, 0.0), "lost_state": ("d", 2.0, 0.1),
    }  # fmt: skip
    assert [claim.holds for claim in analyse(study(**bad)).claims] == [False] * 5


def test_closed_forms_are_what_is_simulated_and_bits_are_compared() -> None:
    trials = [
        Trial("schedules", arm, {}, 0, record(weights, 2.0, 0.0, []))
        for arm, weights in {"accumulation": "a", "gpipe": "a", "1f1b": "b"}.items()
    ]
    found = {c.name: c for c in analyse_megatron(Study("megatron-ptdp", "cpu", tuple(trials), None)).claims}
    assert found["bubbles are the closed forms"].holds
    assert found["so is what ranks hold"].holds
    assert not found["strict semantics"].holds
    assert found["strict semantics"].evidence.startswith("1 of 2 runs")


@pytest.mark.parametrize("slug", ["torchtitan", "megatron-ptdp"])
def test_every_cell_of_the_recipe_can_be_used(slug: str) -> None:
    recipe = load_recipe(RECIPES / slug)
    for preset in recipe.presets:
        assert list(cells(recipe, preset))
