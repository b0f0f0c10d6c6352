"""A frozen part of a model is saved once, and comes back with every checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from resilin.checkpoint.errors import CheckpointError
from resilin.checkpoint.folder import CheckpointFolder


def test_frozen_parameters_are_a_part_of_their_own_and_resume_to_the_bit(tiny_run, digest, tmp_path: Path) -> None:
    def frozen_embedding(folder: Path | None = None):
        run = tiny_run(folder, pace={"steps": 8, "save_every": 4})
        run.model.embed.requires_grad_(False)
        return run

    whole = frozen_embedding(tmp_path)
    whole.train()
    whole.checkpoints.close()
    parts = CheckpointFolder(tmp_path).load(4)
    assert set(parts["frozen"]) == {"embed.weight"}
    assert "embed.weight" not in parts["model"]
    again = frozen_embedding()
    again.load_state_dict(parts)
    again.train()
    assert digest(again.state_dict()["model"]) == digest(whole.state_dict()["model"])


def test_a_model_without_frozen_parameters_has_no_such_part(tiny_run) -> None:
    assert "frozen" not in tiny_run().state_dict()


def test_parts_that_belong_to_another_model_are_refused(tiny_run) -> None:
    run = tiny_run()
    state = run.state_dict()
    state["frozen"] = {"stranger": torch.zeros(1)}
    with pytest.raises(CheckpointError, match="'stranger' was saved, which the model does not have"):
        run.load_state_dict(state)
