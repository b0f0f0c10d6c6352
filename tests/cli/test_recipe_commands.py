"""`resilin recipes list | show` and `resilin reproduce`, as a user types them."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from resilin.cli.main import app
from resilin.config.errors import UserError

RECIPE = """
title = "A trial of nothing much"
claim = "QK-norm does something."
paper = {{ title = "Some paper", year = 2023, arxiv = "2309.14322", figures = [{{ finding = "f", figure = "12.5" }}] }}
[settings]
train = {{ steps = 1, batch_size = 2, device = "cpu" }}
model = {{ hidden_size = 8, layers = 1, heads = 1 }}
evaluation = {{ every = 1, batches = 1 }}
log.tensorboard = false
precision.compute = "fp32"
[settings.source]
use = "resilin.recipes.standard_library:StandardLibrary"
bytes = 20000
sequence_length = 8
cache = "{cache}"
[arms.baseline]
[arms.method]
model.qk_norm = "layer"
[compare]
metric = "nll"
[presets.cpu]
seeds = [0, 1]
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "recipes" / "trial"
    folder.mkdir(parents=True)
    (folder / "recipe.toml").write_text(RECIPE.format(cache=tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*words: str):
    return CliRunner().invoke(app, list(words), env={"COLUMNS": "160"}, catch_exceptions=True)


def test_a_recipe_is_listed_reproduced_and_shown(here: Path):
    listed = run("recipes", "list")
    assert listed.exit_code == 0, listed.output
    assert "trial" in listed.output
    assert "not run yet" in listed.output
    done = run("reproduce", "trial")
    assert done.exit_code == 0, done.output  # whether or not the claim holds
    assert "claim" in done.output
    assert "results.json" in done.output
    assert (here / "recipes/trial/results.json").exists()
    assert "<!-- results -->" in (here / "recipes/trial/README.md").read_text()
    assert "not run yet" not in run("recipes", "list").output
    shown = run("recipes", "show", "trial", "--preset", "cpu")
    assert shown.exit_code == 0, shown.output
    assert "QK-norm does something." in shown.output
    assert "12.5" in shown.output
    assert "main method seed=1" in shown.output


def test_seeds_and_overrides_reach_the_runs(here: Path):
    done = run("reproduce", "trial", "--seeds", "1", "train.batch_size=3", "--runs", "elsewhere")
    assert done.exit_code == 0, done.output
    assert not (here / "recipes/trial/results.json").exists()
    assert "resilin reproduce trial --seeds 1 train.batch_size=3" in (here / "elsewhere/trial/results.json").read_text()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("reproduce", "trail"), "did you mean 'trial'"),
        (("recipes", "show", "trail"), "did you mean 'trial'"),
        (("recipes", "show", "trial", "--preset", "cup"), "did you mean 'cpu'"),
        (("reproduce", "trial", "train.stepps=3"), "did you mean 'steps'"),
        (("reproduce", "trial", "fast"), "key.subkey=value"),
        (("reproduce", "trial", "--processes", "0"), "at least one"),
        (("recipes", "list", "--recipes", "nowhere"), "holds no recipe"),
    ],
)
def test_what_cannot_be_done_is_explained(here: Path, words, message):
    failed = run(*words)
    assert isinstance(failed.exception, UserError)  # `main` prints it and exits with 2
    assert message in str(failed.exception)
