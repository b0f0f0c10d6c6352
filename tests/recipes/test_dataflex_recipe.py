"""The recipe dataflex: its claims are computed from the runs, and DoReMi's earlier runs are stages that are shared."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from resilin.config import parse_settings
from resilin.recipes import stage
from resilin.recipes.cells import cells
from resilin.recipes.dataflex import analyse
from resilin.recipes.findings import Evaluation, Findings, RunRecord, Study, Trial
from resilin.recipes.recipe import load_recipe
from resilin.run.build import build_run
from resilin.run.settings import RunSettings

RECIPE = Path(__file__).parents[2] / "recipes" / "dataflex"
SELECT = {"source": {"warmup_steps": 10}}


def trial(grid: str, arm: str, seed: int, losses: dict[str, float], share: float = 0.5) -> Trial:
    series = {"share/0": tuple((step, 0.0 if step <= 10 else share) for step in range(1, 21))}
    series |= {f"share/{name}": ((1, 0.5),) for name in ("a", "b")}
    found = (Evaluation(step=20, metrics=losses),)
    record = RunRecord(
        hash="x", status="finished", evaluations=found, series=series, parameters=1, settings=SELECT if share else {}
    )
    return Trial(grid, arm, {}, seed, record)


def found(*trials: Trial) -> tuple[Findings, dict[str, bool]]:
    findings = analyse(Study("dataflex", "cpu", trials, None))  # type: ignore[arg-type]
    return findings, {claim.name: claim.holds for claim in findings.claims}


def seeds(grid: str, arm: str, share: float = 0.5, **losses: float) -> list[Trial]:
    """Three seeds, a hundredth apart."""
    return [
        trial(grid, arm, seed, {k.replace("__", "/"): v + 0.01 * seed for k, v in losses.items()}, share)
        for seed in range(3)
    ]


def test_a_selector_has_to_beat_random_by_more_than_the_spread() -> None:
    trials = [
        *seeds("conflict", "random", 0.25, loss=3.0),
        *seeds("conflict", "less_sgd_max", 0.95, loss=2.9),
        *seeds("conflict", "nice_adam_mean", 0.4, loss=2.995),
        *seeds("conflict", "cluster_less", 0.4, loss=3.1),
    ]
    findings, holds = found(*trials)
    assert holds == {
        "less_sgd_max < random (conflict)": True,
        "nice_adam_mean < random (conflict)": False,
        "cluster_less < random (conflict)": False,
        "LESS finds the relevant samples": True,
    }
    assert any("not better than random here: nice_adam_mean, cluster_less" in note for note in findings.notes)
    assert {row[0]: row[3] for row in findings.tables[0].rows}["less_sgd_max"] == pytest.approx(0.95)


def test_mixers_and_weights_are_held_against_uniform_ones_grid_by_grid() -> None:
    trials = [
        *seeds("mix", "uniform", nll__a=2.0, nll__b=3.0),
        *seeds("mix", "odm", nll__a=2.5, nll__b=2.8),
        *seeds("experts", "uniform", nll__a=2.0, nll__b=3.0),
        *seeds("experts", "expert_load", nll__a=1.5, nll__b=3.0),
        *seeds("weigh", "unweighted", loss=3.0),
        *seeds("weigh", "weigh_adapt", loss=2.9),
        *seeds("weigh", "weigh_identity", loss=3.2),
    ]
    _, holds = found(*trials)
    assert holds == {
        "worst domain, odm < uniform": True,
        "mean, odm < uniform": False,
        "worst domain, expert_load < uniform, mixture of experts": False,
        "mean, expert_load < uniform, mixture of experts": True,
        "weigh_adapt < unweighted": True,
        "weigh_identity < unweighted": False,
    }


def test_every_published_method_has_an_arm() -> None:
    recipe = load_recipe(RECIPE)
    text = json.dumps([cell.settings.model_dump(mode="json") for cell in cells(recipe, "cpu", seeds=(0,))])
    wanted = ["less:LESS", "cluster_less:ClusterLESS", "nice:NICE", "near:NEAR", "tsds:TSDS", "loss_band:LossBand",
              "loss_band:DeltaLoss", "uniform:Random", "odm:ODM", "expert_load:ExpertLoad", "mixer:RandomMix",
              "doremi_runs:AfterProxy", "loss_weights:LossWeights", "adapt:Adapt"]  # fmt: skip
    assert [name for name in wanted if name not in text] == []


def final_run(folder: Path, **mixer: Any) -> RunSettings:
    """DoReMi's third run on two small domains."""
    library = {
        "use": "resilin.recipes.standard_library:StandardLibrary",
        "bytes": 20_000,
        "sequence_length": 8,
        "cache": str(folder / "data"),
    }
    tiny = {"hidden_size": 16, "layers": 1, "heads": 2}
    tree = {
        "source": {
            "use": "resilin.steer.mix:Mixed",
            "domains": {"a": library, "b": {**library, "unique_tokens": 800}},
            "mixer": {
                "use": "resilin.recipes.doremi_runs:AfterProxy",
                "model": tiny,
                "steps": 3,
                "folder": str(folder / "stages"),
                **mixer,
            },
        },
        "model": tiny,
        "train": {"steps": 2, "batch_size": 4, "device": "cpu", "threads": 1},
        "evaluation": {"every": 0},
        "precision": {"compute": "fp32"},
        "log": {"tensorboard": False, "live": False},
    }
    return parse_settings(RunSettings, tree, "x")


def test_the_third_doremi_run_draws_by_the_mean_of_its_proxy_and_proxies_share_a_reference(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.set_num_threads(1)
    trained: list[RunSettings] = []
    start = stage.start_run
    monkeypatch.setattr(stage, "start_run", lambda s, *a, **k: trained.append(s) or start(s, *a, **k))  # type: ignore[func-returns-value]
    mixes = []
    for eta in (1.0, 5.0, 1.0):
        run = build_run(final_run(tmp_path, eta=eta))
        assert run.train().reason == "completed"
        mixes.append(run.source.proportions)  # type: ignore[attr-defined]
    assert len(trained) == 3, "one reference and two proxies"
    written = [json.loads(path.read_text())["weights"] for path in (tmp_path / "stages").glob("*/doremi.json")]
    assert len(written) == 2
    assert mixes[0] == mixes[2] != mixes[1]
    assert all(any(mix == pytest.approx(weights) for weights in written) for mix in mixes)
