"""Runs that start from a run: trained once, shared, by seed, through a transform."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from resilin.config import SettingsError, parse_settings
from resilin.models.settings import ModelContext
from resilin.recipes import stage
from resilin.recipes.stage import Stage, StageError
from resilin.run.build import build_run
from resilin.run.settings import RunSettings


@pytest.fixture
def tree(tmp_path: Path) -> dict[str, Any]:
    torch.set_num_threads(1)
    return {
        "source": {
            "use": "resilin.recipes.standard_library:StandardLibrary",
            "bytes": 20_000,
            "sequence_length": 8,
            "cache": str(tmp_path / "data"),
        },
        "model": {"hidden_size": 16, "layers": 1, "heads": 2},
        "train": {"steps": 3, "batch_size": 4, "device": "cpu"},
        "evaluation": {"every": 0},
        "precision": {"compute": "fp32"},
        "log": {"tensorboard": False, "live": False},
    }


def settings_of(tree: dict[str, Any], folder: Path, **model: Any) -> RunSettings:
    later = {**tree, "model": {"use": "resilin.recipes.stage:Stage", "run": tree, "folder": str(folder), **model}}
    return parse_settings(RunSettings, later, "x.toml")


def weights(run: Any) -> list[torch.Tensor]:
    return [p.detach().clone() for p in run.model.parameters()]


def test_the_earlier_run_is_trained_once_and_is_the_run_it_says(
    tree: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    later = build_run(settings_of(tree, tmp_path / "stages"))
    earlier = build_run(parse_settings(RunSettings, tree, "x"))
    earlier.train()
    assert all(torch.equal(a, b) for a, b in zip(weights(later), weights(earlier), strict=True))

    def forbidden(*args: Any, **more: Any) -> Any:
        raise AssertionError("trained again")

    monkeypatch.setattr(stage, "start_run", forbidden)
    again = build_run(settings_of(tree, tmp_path / "stages"))
    assert all(torch.equal(a, b) for a, b in zip(weights(later), weights(again), strict=True))
    assert all(p.requires_grad for p in again.model.parameters())
    with pytest.raises(AssertionError, match="trained again"):
        build_run(settings_of({**tree, "seed": 1}, tmp_path / "stages"))
    with pytest.raises(AssertionError, match="trained again"):
        build_run(settings_of({**tree, "train": {**tree["train"], "steps": 4}}, tmp_path / "stages"))
    assert not list((tmp_path / "stages").rglob("checkpoints"))


def test_the_seed_is_that_of_the_run_that_starts_from_it_unless_it_has_its_own(
    tree: dict[str, Any], tmp_path: Path
) -> None:
    first = Stage(run=tree, folder=tmp_path)
    assert first.settings(5).seed == 5
    assert Stage(run={**tree, "seed": 2}, folder=tmp_path).settings(5).seed == 2
    assert first.place(first.settings(5)) != first.place(first.settings(6))


def test_a_stage_can_start_from_a_stage_under_a_transform(tree: dict[str, Any], tmp_path: Path) -> None:
    dense = {"use": "resilin.recipes.stage:Stage", "run": tree, "folder": str(tmp_path)}
    sparse = {"use": "resilin.sparsity.settings:Sparse", "model": dense}
    third = Stage(run={**tree, "model": sparse}, folder=tmp_path).build(ModelContext(0, 260))
    for name in ("attention.q", "mlp.down"):
        weight = third.blocks[0].get_submodule(name).weight  # type: ignore[index, union-attr]
        assert ((weight != 0).view(weight.shape[0], -1, 4).sum(-1) <= 2).all()
    assert len(list(tmp_path.glob("*/model.safetensors"))) == 2


def test_a_failed_or_misfit_earlier_run_is_told(tree: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="the run of a stage"):
        settings_of({**tree, "train": {"stepps": 3}}, tmp_path)
    wild = {**tree, "optimizer": {"lr": 1e30, "schedule": {"warmup": 0}}}
    with pytest.raises(StageError, match=r"was not finished \(failed\).*not finite"):
        Stage(run=wild, folder=tmp_path).build(ModelContext(0, None))
    with pytest.raises(StageError, match="knows 260 tokens, the source's tokenizer has 999"):
        Stage(run=tree, folder=tmp_path).build(ModelContext(0, 999))


def test_earlier_runs_are_forgotten_wherever_settings_hold_them(tree: dict[str, Any], tmp_path: Path) -> None:
    folder = tmp_path / "stages"
    dense = {"use": "resilin.recipes.stage:Stage", "run": tree, "folder": str(folder)}
    sparse = {"use": "resilin.sparsity.settings:Sparse", "model": dense}
    inner = {**tree, "model": {"use": "resilin.recipes.stage:Stage", "run": {**tree, "model": sparse}}}
    inner["model"]["folder"] = str(folder)
    settings = parse_settings(RunSettings, inner, "x")
    build_run(settings)
    assert len(list(folder.glob("*/model.safetensors"))) == 2
    stage.forget_stages(settings.model_copy(update={"seed": 1}))  # those of another seed are not its own
    assert len(list(folder.glob("*/model.safetensors"))) == 2
    stage.forget_stages(settings)
    assert not list(folder.glob("*/model.safetensors"))
