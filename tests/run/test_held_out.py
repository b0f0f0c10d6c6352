"""Several held-out sets in one run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from resilin.config import SettingsError, UserError, parse_settings
from resilin.data.errors import DataError
from resilin.run.build import build_run
from resilin.run.overview import overview
from resilin.run.settings import RunSettings
from resilin.run.start import start_run


@pytest.fixture
def tree(tmp_path: Path) -> dict[str, Any]:
    for name, line in (("plain", "the cat sat on the mat. "), ("other", "qjzx 0918 %$# ")):
        (tmp_path / f"{name}.txt").write_text(line * 60, encoding="utf-8")

    def source(name: str, **more: Any) -> dict[str, Any]:
        return {
            "paths": [str(tmp_path / f"{name}.txt")],
            "sequence_length": 16,
            "tokenizer": {"kind": "bytes"},
            "cache": str(tmp_path / "cache"),
            "workers": 1,
            "held_out": {"by": "tail", **more},
        }

    return {
        "source": source("plain", fraction=0.2),
        "model": {"hidden_size": 16, "layers": 1, "heads": 2},
        "train": {"steps": 20, "batch_size": 4, "device": "cpu", "threads": 1},
        "optimizer": {"lr": 0.02},
        "precision": {"compute": "fp32"},
        "evaluation": {"every": 10, "held_out": {"other": source("other", fraction=1.0)}},
        "log": {"tensorboard": False, "live": False},
    }


def test_each_held_out_set_is_evaluated_and_logged_by_its_name(tree: dict[str, Any], tmp_path: Path) -> None:
    settings = parse_settings(RunSettings, tree, "x")
    run, outcome = start_run(settings, tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run/events.jsonl").read_text().splitlines()]
    found = [(line["step"], line["name"]) for line in lines if line["event"] == "eval"]
    assert found == [(10, "validation"), (10, "other"), (20, "validation"), (20, "other")]
    # What it was trained on is easier than what it never saw.
    assert outcome.metrics["validation/loss"] < outcome.metrics["other/loss"] - 0.5
    assert len(run.validation["other"].stream) == 60 * len("qjzx 0918 %$# ") + 1  # with the token that ends it
    facts = dict(overview(tmp_path / "run")["progress"])
    assert {"validation loss", "other loss"} <= set(facts)


def test_a_name_that_is_taken_or_no_name_is_refused(tree: dict[str, Any]) -> None:
    for name in ("validation", "a/b", ""):
        wrong = {**tree, "evaluation": {"held_out": {name: tree["source"]}}}
        with pytest.raises(SettingsError, match="names held-out data"):
            parse_settings(RunSettings, wrong, "x")


def test_another_tokenizer_is_refused_before_training(tree: dict[str, Any]) -> None:
    other = {**tree["evaluation"]["held_out"]["other"], "tokenizer": {"kind": "bpe", "vocab_size": 300}}
    wrong = {**tree, "evaluation": {"every": 10, "held_out": {"other": other}}}
    with pytest.raises(UserError, match=r"evaluation\.held_out\.other: its tokenizer is another"):
        build_run(parse_settings(RunSettings, wrong, "x"))


def test_data_that_is_all_held_out_cannot_be_trained_on(tree: dict[str, Any]) -> None:
    wrong = {**tree, "source": {**tree["source"], "held_out": {"fraction": 1.0}}}
    with pytest.raises(DataError, match=r"train split has 0 tokens; at least 2 are needed; lower held_out\.fraction"):
        build_run(parse_settings(RunSettings, wrong, "x"))
