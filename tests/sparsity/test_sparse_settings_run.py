"""A sparse run from settings: its teacher, resuming, opening and exporting it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from resilin.config import parse_settings
from resilin.models.decoder import Decoder
from resilin.models.huggingface import load_pretrained
from resilin.run.build import build_run
from resilin.run.export import export_model
from resilin.run.folder import RunFolder
from resilin.run.open_model import open_model
from resilin.run.settings import RunSettings
from resilin.run.start import resume_from_latest, start_run
from resilin.sparsity.export import export_sparse, read_masks
from resilin.sparsity.masks import sparse_layers


@pytest.fixture
def settings(tmp_path: Path) -> RunSettings:
    text = tmp_path / "text.txt"
    text.write_text("".join(f"line {i}: {i * 7919 % 1000} lazy dogs\n" for i in range(400)))
    tree: dict[str, Any] = {
        "source": {"paths": [str(text)], "sequence_length": 16, "cache": str(tmp_path / "cache"),
                   "held_out": {"fraction": 0}},
        "model": {
            "use": "resilin.sparsity.settings:Sparse",
            "update_every": 2,
            "slorb": {"k": 8},
            "model": {"hidden_size": 16, "layers": 2, "heads": 2, "mlp_size": 32},
        },
        "optimizer": {"use": "resilin.sparsity.adamw:SparseAdamW", "lr": 1e-2, "ramp": {"maximum": 0.1, "steps": 2}},
        "objective": {"use": "resilin.objective.distill:Distilled"},
        "train": {"steps": 5, "batch_size": 4, "micro_batch_size": 2, "device": "cpu", "threads": 1},
        "evaluation": {"every": 0},
        "precision": {"compute": "fp32"},
        "log": {"live": False, "tensorboard": False},
    }  # fmt: skip
    return parse_settings(RunSettings, tree, "x.toml")


def test_the_teacher_is_the_dense_original(settings: RunSettings) -> None:
    run = build_run(settings)
    teacher = run.objective.teacher  # type: ignore[attr-defined]
    assert isinstance(teacher, Decoder)
    assert not list(sparse_layers(teacher))
    for name, parameter in teacher.named_parameters():
        assert torch.equal(parameter, run.model.get_parameter(name)), name
        assert not parameter.requires_grad
    assert not teacher.training


def test_a_run_resumes_to_the_bit_and_opens_and_exports_as_it_ended(settings: RunSettings, tmp_path: Path) -> None:
    whole, outcome = start_run(settings, tmp_path / "whole")
    assert outcome.reason == "completed"
    first = build_run(settings, RunFolder(tmp_path / "cut"))
    assert first.checkpoints is not None
    while first.step < 3:
        first._take_step()
    first.save()
    second = build_run(settings, RunFolder(tmp_path / "cut"))
    assert second.checkpoints is not None
    assert resume_from_latest(second, second.checkpoints)
    second.train()
    expected = whole.model.state_dict()
    for name, tensor in second.model.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
    for run in (first, second):
        run.checkpoints.close()  # type: ignore[union-attr]

    tokens = torch.arange(24).view(2, 12)
    with torch.no_grad():
        trained = whole.model.eval()(tokens).hidden_BTD
        plain = open_model(tmp_path / "whole", device="cpu")
        torch.testing.assert_close(plain.model(tokens).hidden_BTD, trained, rtol=1e-4, atol=1e-5)
        export_model(plain.model, plain.tokenizer, tmp_path / "merged")
        as_trained = open_model(tmp_path / "whole", device="cpu", plain=False).model
        assert torch.equal(as_trained(tokens).hidden_BTD, trained)
        export_sparse(as_trained, tmp_path / "sparse")
    weight = load_pretrained(tmp_path / "sparse").blocks[0].attention.q.weight
    assert torch.equal(weight != 0, read_masks(tmp_path / "sparse")["model.layers.0.self_attn.q_proj.weight"])
    assert (load_pretrained(tmp_path / "merged").blocks[0].attention.q.weight != 0).all()
