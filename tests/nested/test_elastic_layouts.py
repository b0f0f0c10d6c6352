"""Elastic pre-training of a balanced mixture of experts under every way to divide it: the run of one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from forked import run_ranks
from ports import free_port
from split_steps import check_two_workers
from tiny_text import text_source

from resilin.checkpoint.folder import CheckpointFolder
from resilin.cluster.position import Position
from resilin.config import parse_settings
from resilin.keys import Keys
from resilin.models.decoder_settings import DecoderSettings, MoESettings
from resilin.nested.elastic_pretraining import ElasticPretraining
from resilin.run.settings import RunSettings
from resilin.run.start import start_run

STEPS = 5
MOE = {"experts": 6, "experts_per_token": 3, "expert_size": 8, "balance": "bias", "balance_rate": 0.02}
OBJECTIVE = {
    "objective": {"load_balance": 0.0},
    "depth": {"probability": 0.6},
    "width": {"probability": 0.6, "experts": [4]},
    "sparsity": {"probability": 0.6},
}


def test_two_workers_have_the_bits_of_one():
    model = DecoderSettings(hidden_size=16, layers=3, heads=2, moe=MoESettings.model_validate(MOE), init_std=0.4)
    check_two_workers(model, ElasticPretraining.model_validate(OBJECTIVE), 4)


def go(rank: int, text: Path, folder: Path, workers: int, parallel: dict[str, Any], port: int) -> str:
    torch.set_num_threads(1)
    place = Position(rank, workers, rank, workers, "127.0.0.1", port) if workers > 1 else None
    tree = {
        "source": text_source(text),
        "model": {"hidden_size": 16, "layers": 4, "heads": 2, "moe": MOE, "init_std": 0.3},
        "objective": {"use": "resilin.nested.elastic_pretraining:ElasticPretraining", **OBJECTIVE},
        "optimizer": {"lr": 3e-3, "schedule": {"use": "resilin.optim.schedule:Constant"}},
        "train": {"steps": STEPS, "batch_size": 8, "micro_batch_size": 2, "threads": 1, "device": "cpu"},
        "precision": {"compute": "fp32"},
        "parallel": {"timeout": 60, **parallel},
        "evaluation": {"every": 0},
        "log": {"tensorboard": False, "live": False},
    }
    _, outcome = start_run(parse_settings(RunSettings, tree, "test"), folder, place=place)
    return outcome.reason


def weights(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = CheckpointFolder(folder / "checkpoints").load(STEPS)["model"]
    return found


def test_these_steps_leave_out_layers_experts_and_choices():
    objective = ElasticPretraining.model_validate(OBJECTIVE).build()
    model = DecoderSettings(vocab_size=9, hidden_size=16, layers=4, heads=2, moe=MoESettings.model_validate(MOE))
    drawn = [objective.drawn_at(0, step, model) for step in range(STEPS)]
    assert any(one.skip for one in drawn)
    assert any(one.experts for one in drawn)
    assert any(one.top_k for one in drawn)
    assert drawn == [
        objective.sampler.draw(model, Keys.of_step(0, s).fold("elastic pre-training")) for s in range(STEPS)
    ]


@pytest.mark.slow
def test_no_layout_changes_what_is_learned(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("It was the best of times, it was the worst of times. " * 200)
    assert run_ranks(1, go, text, tmp_path / "one", 1, {}, 0, connect=False) == ["completed"]
    expected = weights(tmp_path / "one")
    offsets = [name for name in expected if name.endswith("balance_bias")]
    assert len(offsets) == 4
    assert all(bool(expected[name].any()) for name in offsets)
    for name, parallel, exact in (
        ("pipeline", {"pipeline": 2}, True),
        ("expert", {"expert": 2}, False),
        ("fsdp", {"data": 2, "sharding": "fsdp"}, False),
        ("context", {"context": 2}, False),
        ("tensor", {"tensor": 2}, False),
    ):
        told = run_ranks(2, go, text, tmp_path / name, 2, parallel, free_port(), connect=False, timeout=400)
        assert told == ["completed"] * 2
        found = weights(tmp_path / name)
        assert found.keys() == expected.keys()
        for parameter, tensor in expected.items():
            where = f"{parameter}, {name}"
            if exact or parameter in offsets:
                assert torch.equal(found[parameter], tensor), where
            else:
                torch.testing.assert_close(found[parameter], tensor, rtol=2e-3, atol=2e-3, msg=where)
