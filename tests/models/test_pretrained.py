"""Training may start from weights that exist."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from resilin.models.decoder_settings import DecoderSettings
from resilin.models.huggingface import save_pretrained
from resilin.models.pretrained import Pretrained
from resilin.models.settings import ModelContext
from resilin.models.weight_files import ModelFolderError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    settings = DecoderSettings(vocab_size=32, hidden_size=16, layers=2, heads=2, mlp_size=24)
    save_pretrained(settings.build(ModelContext(3)), tmp_path / "model")
    return tmp_path / "model"


def test_the_weights_are_those_of_the_folder(folder: Path) -> None:
    meant = DecoderSettings(vocab_size=32, hidden_size=16, layers=2, heads=2, mlp_size=24).build(ModelContext(3))
    built = Pretrained(path=folder, dropout=0.1, recompute="block").build(ModelContext(99, 32))
    for name, parameter in meant.named_parameters():
        assert torch.equal(parameter, built.get_parameter(name)), name
    assert built.settings.dropout == 0.1  # type: ignore[union-attr]
    assert built.settings.recompute == "block"  # type: ignore[union-attr]
    assert all(p.requires_grad for p in built.parameters())


def test_a_tokenizer_that_is_too_large_is_named(folder: Path) -> None:
    with pytest.raises(ModelFolderError, match=r"knows 32 tokens.*33.*source\.tokenizer"):
        Pretrained(path=folder).build(ModelContext(0, 33))


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelFolderError, match="nowhere"):
        Pretrained(path=tmp_path / "nowhere").build(ModelContext(0))
