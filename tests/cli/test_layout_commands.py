"""`resilin layout show | plan` as a user calls them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from resilin.checkpoint.folder import CheckpointFolder
from resilin.cli.main import app
from resilin.config import UserError

SETTINGS = "[model]\nvocab_size = 96\nhidden_size = 16\nlayers = 2\nheads = 2\n[source]\npaths = ['text.txt']\n"


@pytest.fixture
def settings(tmp_path: Path) -> Path:
    path = tmp_path / "run.toml"
    path.write_text(SETTINGS, encoding="utf-8")
    return path


def call(*arguments: object) -> str:
    result = CliRunner().invoke(app, ["layout", *map(str, arguments)])
    if result.exception is not None:
        raise result.exception
    return result.output


def test_show_draws_the_tensors_asked_for(settings: Path, tmp_path: Path) -> None:
    said = call("show", settings, "model.layers=3", "--mesh", "dp=2,tp=2", "--sharding", "none", "--tensor", "q.weight",
                "--picture", tmp_path / "q.svg")  # fmt: skip
    assert "blocks.0.attention.q.weight (+2 alike)  F32 16x16       4        4       2" in said
    assert "  a rank 0, 2\n  b rank 1, 3" in said
    assert (tmp_path / "q.svg").exists()


def test_plan_counts_what_moves(settings: Path) -> None:
    said = call("plan", settings, "--mesh", "dp=4", "--sharding", "dealt", "--to-mesh", "dp=4")
    assert "0 B between places" in said
    assert "(100.0%) already there" in said
    assert "senders, the busiest" in call("plan", settings, "--mesh", "dp=4", "--to-mesh", "dp=2,tp=2")


def test_the_vocabulary_is_the_tokenizer_s_or_has_to_be_said(settings: Path) -> None:
    settings.write_text(SETTINGS.replace("vocab_size = 96\n", ""), encoding="utf-8")
    known = call("show", settings, "source.tokenizer.kind=bpe", "source.tokenizer.vocab_size=300", "--tensor", "embed")
    assert "embed.weight  F32 300x16" in known
    with pytest.raises(UserError, match=r"say model\.vocab_size="):
        call("show", settings, "source.tokenizer.kind=characters")


def test_a_checkpoint_shows_which_file_holds_what(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path)
    folder.save(7, {"model": {"w": torch.ones(4, 6)}, "optimizer": {"w": {"exp_avg": torch.ones(4, 6)}}})
    said = call("show", folder.step_path(7), "--tensor", "^model/w$")
    assert "model/w: F32 4x6" in said
    assert "0 file model.safetensors" in said
    assert "file optimizer.safetensors        1   96 B  50.00%" in said


def test_what_cannot_be_shown_says_why(settings: Path, tmp_path: Path) -> None:
    for arguments, message in (
        (("show", settings, "--mesh", "dp:4"), "is no axis=size"),
        (("show", settings, "--tensor", "nothing"), "matches none of"),
        (("show", settings, "--tensor", "("), "is not a regular expression"),
        (("show", tmp_path), "is no settings file, run, Hugging Face folder"),
        (("show", tmp_path, "model.layers=2"), "go with a settings file only"),
        (("show", settings, "--mesh", "pp=3"), "3 pipeline stages cannot share 2 blocks"),
    ):
        with pytest.raises(UserError, match=message):
            call(*arguments)
