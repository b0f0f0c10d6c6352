"""The methods of examples/my_methods: found outside the package, composed, resumed to the bit."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from resilin.config.load import load_settings
from resilin.run.build import build_run
from resilin.run.folder import RunFolder
from resilin.run.run import Run
from resilin.run.settings import RunSettings
from resilin.run.start import resume_from_latest

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture(autouse=True)
def _examples_are_importable(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)  # token shards are cached below the working folder
    monkeypatch.syspath_prepend(str(EXAMPLES))
    yield
    for name in [name for name in sys.modules if name.split(".")[0] == "my_methods"]:
        del sys.modules[name]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "text.txt"
    file.write_text(
        "".join(f"line {i}: the quick brown fox jumps over {i * 7919 % 1000} lazy dogs\n" for i in range(900))
    )
    return file


def _settings(text: Path, *changes: str) -> RunSettings:
    tree = [
        f"source.source.paths=['{text}']",
        "source.source.sequence_length=24",
        "source.source.held_out.fraction=0",
        "source.first=8",
        "source.steps=4",
        "model.model.hidden_size=16",
        "model.model.layers=2",
        "model.model.heads=2",
        "model.model.dropout=0.1",
        "optimizer.k=2",
        "train.steps=7",
        "train.batch_size=6",
        "train.device=cpu",
        "train.threads=1",
        "precision.compute=fp32",
        "evaluation.every=0",
        *changes,
    ]
    return load_settings(RunSettings, EXAMPLES / "my_methods" / "settings.toml", tree)


def _weights(run: Run) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in run.model.named_parameters()}


def _trained(settings: RunSettings, **changes: Any) -> dict[str, torch.Tensor]:
    run = build_run(settings, **changes)
    assert run.train().reason == "completed"
    return _weights(run)


def test_all_four_resume_to_the_bit(text: Path, tmp_path: Path) -> None:
    whole = _trained(_settings(text))
    folder = RunFolder(tmp_path / "run")
    first = build_run(_settings(text), folder)
    first.pace = type(first.pace)(**{**{f: getattr(first.pace, f) for f in first.pace.__slots__}, "steps": 3})
    first.train()
    assert first.checkpoints is not None
    first.checkpoints.close()
    second = build_run(_settings(text), folder)
    assert second.checkpoints is not None
    assert resume_from_latest(second, second.checkpoints)
    assert second.step == 3
    second.train()
    second.checkpoints.close()
    for name, tensor in _weights(second).items():
        assert torch.equal(tensor, whole[name]), name


def test_another_micro_batch_size_gives_the_same_up_to_rounding(text: Path) -> None:
    whole = _trained(_settings(text))
    for name, tensor in _trained(_settings(text, "train.micro_batch_size=2")).items():
        torch.testing.assert_close(tensor, whole[name], rtol=2e-4, atol=2e-5)


def test_each_at_strength_zero_is_the_plain_run(text: Path) -> None:
    off = ["model.skip=0", "objective.strength=0", "optimizer.alpha=1", "source.first=24"]
    changed = _trained(_settings(text, *off))
    settings = _settings(text)
    inner = {part: getattr(getattr(settings, part), part) for part in ("source", "model", "objective", "optimizer")}
    plain = _trained(settings.model_copy(update=inner))
    for name, tensor in changed.items():
        torch.testing.assert_close(tensor, plain[name], rtol=0, atol=1e-5)
    on = _trained(_settings(text))
    assert any(not torch.equal(on[name], plain[name]) for name in plain)


def test_the_command_finds_them_in_the_folder_it_is_given_in(text: Path, tmp_path: Path) -> None:
    words = ["train", "my_methods/settings.toml", "--print-config", f"source.source.paths=['{text}']"]
    command = Path(sys.executable).parent / "resilin"
    found = subprocess.run([command, *words], cwd=EXAMPLES, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    assert 'use = "my_methods.lookahead:Lookahead"' in found.stdout
    elsewhere = subprocess.run(
        [command, "train", str(EXAMPLES / "my_methods" / "settings.toml"), "--print-config"],
        cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert elsewhere.returncode == 2
    assert "run the command in its folder" in elsewhere.stderr
