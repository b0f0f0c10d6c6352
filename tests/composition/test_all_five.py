"""Five methods in one run: chosen data, a schedule of shapes, adapters, moving masks, preferences. Resumed to the bit.

The run's settings are plain tables; the step loop knows none of the five (tests/run/test_run.py says so).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from resilin.data.train_tokenizer import byte_tokenizer
from resilin.run.build import build_run
from resilin.run.folder import RunFolder
from resilin.run.run import Run
from resilin.run.settings import RunSettings

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(autouse=True)
def _examples_are_importable(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(EXAMPLES))
    yield
    for name in [name for name in sys.modules if name.split(".")[0] == "my_methods"]:
        del sys.modules[name]


@pytest.fixture
def pairs(tmp_path: Path) -> dict[str, Any]:
    """A preference source's settings: sums, of which the right one is preferred."""
    rows = [
        {"prompt": f"{a} + {b} = ", "chosen": str(a + b), "rejected": str(a + b + 1 + a % 3)}
        for a in range(8)
        for b in range(10)
    ]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    byte_tokenizer().save(tmp_path / "tokenizer")
    return {
        "use": "resilin.data.preference_source:PreferenceSource",
        "paths": [str(tmp_path / "pairs.jsonl")],
        "tokenizer": str(tmp_path / "tokenizer"),
        "sequence_length": 24,
        "pad": "length",
        "held_out": {"fraction": 0},
    }


# One sparse matrix is trained in full, so that its mask moves under the adapters of the others.
FULL = "blocks.1.mlp.down"
ADAPTER = {"method": "miss", "rank": 4, "dropout": 0.1, "exclude": [FULL], "modules_to_save": [FULL]}
MODEL = {
    "use": "resilin.adapt.adapted:Adapted",
    "adapters": {"default": ADAPTER},
    "model": {
        "use": "resilin.sparsity.settings:Sparse",
        "update_every": 2,
        "model": {"hidden_size": 16, "layers": 2, "heads": 2, "mlp_size": 24},
    },
}
PREFERENCE = {"use": "resilin.posttrain.preference_loss:Preference", "dropout": True}


def settings_of(
    source: dict[str, Any], objective: dict[str, Any], optimizer: dict[str, Any], **train: Any
) -> RunSettings:
    return RunSettings.model_validate(
        {
            "source": source,
            "model": MODEL,
            "objective": objective,
            "optimizer": optimizer,
            "train": {"batch_size": 4, "device": "cpu", "threads": 1, **train},
            "precision": {"compute": "fp32"},
            "evaluation": {"every": 0},
            "checkpoint": {"every": 1, "keep_last": 99},
        }
    )


def chosen(source: dict[str, Any]) -> dict[str, Any]:
    """Samples chosen by how badly their pairs are told apart, every other step anew."""
    return {
        "use": "resilin.steer.select:Selected",
        "source": source,
        "selector": {"use": "resilin.steer.loss_band:LossBand", "focus": "high"},
        "warmup_steps": 2,
        "update_steps": 2,
        "update_times": 2,
    }


def in_shapes(pairs: dict[str, Any]) -> dict[str, Any]:
    """Short pairs in large batches first."""
    return {
        "use": "resilin.multigrid.source:Multigrid",
        "epochs": 8,
        "stages": [4, 6],
        "steps_per_epoch": 1,
        "short_cycle": False,
        "long_factors": [[0.5, 1], [1, 1]],
        "source": {"use": "my_methods.pair_grid:PairGrid", "length": 24, "source": pairs},
    }


RATE = {
    "use": "resilin.multigrid.rate:MultigridRate",
    "optimizer": {
        "use": "resilin.optim.adamw:AdamW",
        "lr": 1e-2,
        "schedule": {"use": "resilin.optim.stepwise:Stepwise", "boundaries": [4, 6]},
    },
}


def steered(pairs: dict[str, Any], **train: Any) -> RunSettings:
    """Chosen pairs in their whole length."""
    return settings_of(chosen(pairs), PREFERENCE, {"lr": 1e-2}, **{"steps": 7, **train})


def all_five(pairs: dict[str, Any], **train: Any) -> RunSettings:
    """Chosen pairs in shapes, weighted by their loss as well."""
    objective = {
        "use": "resilin.steer.weight:Weighted",
        "objective": PREFERENCE,
        "weighter": {"use": "resilin.steer.loss_weights:LossWeights"},
    }
    return settings_of(chosen(in_shapes(pairs)), objective, RATE, **train)


def _same(left: Any, right: Any, path: str = "") -> None:
    if isinstance(left, dict):
        assert left.keys() == right.keys(), path
        for key in left:
            _same(left[key], right[key], f"{path}/{key}")
    elif isinstance(left, list | tuple):
        assert len(left) == len(right), path
        for number, (a, b) in enumerate(zip(left, right, strict=True)):
            _same(a, b, f"{path}/{number}")
    elif isinstance(left, torch.Tensor):
        assert torch.equal(left, right), path
    else:
        assert left == right, path


def _resumed(settings: RunSettings, folder: Path, step: int) -> Run:
    """A run that goes on from a checkpoint which another run made on its way."""
    run = build_run(settings, RunFolder(folder))
    assert run.checkpoints is not None
    run.load_state_dict(run.checkpoints.load(step))
    run.checkpoints.close()
    run.checkpoints, run.pace = None, replace(run.pace, save_every=0)
    assert run.step == step
    assert run.train().reason == "completed"
    return run


@pytest.mark.parametrize("stop", [1, 3, 4])
def test_selected_pairs_on_an_adapted_sparse_model_resume_to_the_bit(
    pairs: dict[str, Any], tmp_path: Path, stop: int
) -> None:
    whole = build_run(steered(pairs), RunFolder(tmp_path / "whole"))
    assert whole.train().reason == "completed"
    assert whole.checkpoints is not None
    whole.checkpoints.close()
    _same(whole.state_dict(), _resumed(steered(pairs), tmp_path / "whole", stop).state_dict())


def test_all_five_resume_to_the_bit(pairs: dict[str, Any], tmp_path: Path) -> None:
    total = build_run(all_five(pairs, steps=1)).source.grid_schedule.total  # type: ignore[attr-defined]
    settings = all_five(pairs, steps=total)
    whole = build_run(settings, RunFolder(tmp_path / "whole"))
    shapes: list[tuple[int, int]] = []
    chosen_rows: list[list[int]] = []
    fetch = whole.source.fetch

    def watched(step: int, slots: Any) -> Any:
        batch = fetch(step, slots)
        if len(shapes) == step:
            shapes.append(tuple(batch["chosen_tokens"].shape))
            chosen_rows.append(batch["samples"].tolist())
        return batch

    whole.source.fetch = watched  # type: ignore[method-assign]
    assert whole.train().reason == "completed"
    schedule: Any = whole.source.grid_schedule  # type: ignore[attr-defined]
    phases = [schedule.phase(step) for step in range(total)]
    assert shapes == [(4 * phase.multiplier, phase.grid.frames) for phase in phases]
    assert len(set(shapes)) > 1, "the batch never changed its shape"
    window = chosen_rows[2] + chosen_rows[3]
    assert len(set(window)) == len(window), "a chosen pair came twice"
    stored = sorted((tmp_path / "whole" / "selections").glob("*.json"))
    assert sorted(window) == sorted(json.loads(stored[0].read_text())["indices"]["values"])
    assert whole.checkpoints is not None
    whole.checkpoints.close()
    for stop in (2, 3, 5):  # at a selection, inside its window, and in another shape
        _same(whole.state_dict(), _resumed(settings, tmp_path / "whole", stop).state_dict())


def test_each_part_does_its_own(pairs: dict[str, Any], tmp_path: Path) -> None:
    run = build_run(steered(pairs), RunFolder(tmp_path / "run"))
    before = {name: p.detach().clone() for name, p in run.model.named_parameters()}
    run.train()
    moved = {name for name, p in run.model.named_parameters() if not torch.equal(p, before[name])}
    frozen = {name for name, p in run.model.named_parameters() if not p.requires_grad}
    assert moved, "nothing was learnt"
    assert not moved & frozen, "a frozen weight moved"
    masks = {name: m for name, m in run.model.named_buffers() if name.endswith("mask")}
    assert masks
    for name, mask in masks.items():
        assert (mask.view(mask.shape[0], -1, 4).sum(-1) == 2).all(), name
    chosen = run.source._chosen  # type: ignore[attr-defined]
    assert len(chosen) == len(chosen.unique())


def test_micro_batches_change_nothing_but_rounding(pairs: dict[str, Any]) -> None:
    whole, parts = (build_run(steered(pairs, micro_batch_size=size)) for size in (4, 2))
    for run in (whole, parts):
        assert run.train().reason == "completed"
    for (name, left), (_, right) in zip(whole.model.named_parameters(), parts.model.named_parameters(), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.parametrize("method", ["miss", "mini", "bat_col", "bat_row", "bat_ab", "lora", "rslora", "dora"])
@pytest.mark.parametrize("slorb", [None, {"k": 4}])
def test_an_adapter_starts_from_what_the_sparse_layer_computes(method: str, slorb: dict[str, int] | None) -> None:
    from resilin.adapt.adapted import Adapted
    from resilin.models.settings import ModelContext

    sparse = {**MODEL["model"], "slorb": slorb}  # type: ignore[dict-item]
    adapter = {"method": method, "rank": 4, **({"mini_rank": 4} if method == "mini" else {})}
    adapted = Adapted.model_validate({"model": sparse, "adapters": {"default": adapter}})
    with_it, without = adapted.build(ModelContext(0, 32)), adapted.model.build(ModelContext(0, 32))
    tokens = torch.arange(24).view(2, 12)
    torch.testing.assert_close(with_it(tokens)[0], without(tokens)[0], rtol=1e-5, atol=1e-5)
