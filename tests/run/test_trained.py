"""A run's model as a model to start from."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from resilin.config import parse_settings
from resilin.models.settings import ModelContext
from resilin.run.open_model import OpenModelError
from resilin.run.settings import RunSettings
from resilin.run.start import start_run
from resilin.run.trained import Trained


def test_it_has_the_runs_weights_and_trains(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("to be or not to be, that is the question. " * 40)
    settings = parse_settings(
        RunSettings,
        {
            "source": {"paths": [str(tmp_path / "a.txt")], "tokenizer": {"kind": "bytes"}, "sequence_length": 16,
                       "held_out": {"fraction": 0.0}, "cache": str(tmp_path / "cache"), "workers": 1},
            "model": {"hidden_size": 16, "layers": 1, "heads": 2},
            "train": {"steps": 2, "batch_size": 2, "device": "cpu", "threads": 1},
            "evaluation": {"every": 0},
            "precision": {"compute": "fp32"},
            "log": {"tensorboard": False, "live": False},
        },
        "test",
    )  # fmt: skip
    run, _ = start_run(settings, tmp_path / "run")
    model = Trained(path=tmp_path / "run").build(ModelContext(0, run.source.vocab_size))  # type: ignore[attr-defined]
    for name, value in run.model.state_dict().items():
        assert torch.equal(value, model.state_dict()[name])
    assert model.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    with pytest.raises(OpenModelError, match="use the tokenizer of that run"):
        Trained(path=tmp_path / "run").build(ModelContext(0, 10_000))
    with pytest.raises(OpenModelError, match="there is no such file or folder"):
        Trained(path=tmp_path / "gone").build(ModelContext(0, None))
