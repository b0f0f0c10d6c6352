"""`resilin plan --cluster` as a user calls it, to the run that it writes settings for."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from typer.testing import CliRunner

from resilin.cli.main import app

PAGE = Path(__file__).parents[2] / "docs" / "plan.md"
TEXT = "resilin makes insect joints elastic and keeps a run going\n" * 60
RUN = """
name = "planned"
[model]
hidden_size = 16
layers = 4
heads = 2
[source]
paths = ["text.txt"]
sequence_length = 16
[source.tokenizer]
kind = "bytes"
[source.held_out]
fraction = 0
[train]
batch_size = 8
steps = 2
device = "cpu"
[evaluation]
every = 0
[log]
tensorboard = false
live = false
"""


def call(*arguments: object, code: int = 0) -> str:
    result = CliRunner().invoke(app, ["plan", *map(str, arguments)], env={"COLUMNS": "120"})
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return result.output


@pytest.fixture
def place(tmp_path: Path) -> Path:
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    (tmp_path / "run.toml").write_text(RUN, encoding="utf-8")
    return tmp_path


@pytest.mark.parametrize(
    "fixed",
    [
        ("parallel.pipeline=2",),
        pytest.param(("parallel.tensor=2", "parallel.pipeline=2"), marks=pytest.mark.slow),
        pytest.param(("parallel.data=4", "parallel.sharding=fsdp"), marks=pytest.mark.slow),
        pytest.param(("parallel.data=2", "parallel.pipeline=2", "model.recompute=block"), marks=pytest.mark.slow),
    ],
)
def test_the_written_settings_run_unchanged(
    place: Path, fixed: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place)
    workers = 2 if len(fixed) == 1 else 4
    said = call(
        "run.toml", *fixed, "--cluster", "laptop", "--workers", workers, "--tokens", 256, "--write", "planned.toml"
    )
    assert "resilin train planned.toml" in said
    written = tomllib.loads((place / "planned.toml").read_text(encoding="utf-8"))
    for override in fixed:
        (table, name), value = override.partition("=")[0].split("."), override.partition("=")[2]
        assert str(written[table][name]) == value
    command = [sys.executable, "-m", "resilin", "train", "planned.toml"]
    ended = subprocess.run(command, cwd=place, capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    events = (place / "runs" / "planned" / "events.jsonl").read_text(encoding="utf-8")
    assert len(re.findall(r'"event": ?"step"', events)) == 2
    assert f"{workers} workers" in events


def shown(page: str, arguments: str) -> str:
    found = re.search(rf"\$ resilin plan {re.escape(arguments)}\n((?:.*\n)*?)```", page)
    assert found is not None
    return found.group(1)


@pytest.mark.parametrize(
    ("more", "told"), [("--workers 24 --tokens 2e11 --top 3", "Pareto set"), ("--workers 1 --tokens 2e11", "smallest")]
)
def test_the_page_shows_what_the_command_says(more: str, told: str) -> None:
    arguments = f"--model gpt-13b --cluster dgx-a100-40 {more}"
    said = call(*arguments.split(), code=0 if told == "Pareto set" else 1)
    page = shown(PAGE.read_text(encoding="utf-8"), arguments)
    assert page.split() == said.split()
    assert told in said


@pytest.mark.slow
def test_what_the_page_says_of_failures_is_what_the_command_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    data = ("source.use=resilin.data.packed:Shards", "source.path=/data/tokens", "name=thirteen")
    asked = ("--model", "gpt-13b", "--cluster", "dgx-a100-40", "--workers", 24, "--tokens", "2e11", *data)
    call(*asked, "--write", "thirteen.toml")
    arguments = ("failures", "--layout", "thirteen.toml", "--cluster", "dgx-a100-40", "--losses-a-day", "1")
    said = call(*arguments)
    assert shown(PAGE.read_text(encoding="utf-8"), " ".join(arguments)).split() == said.split()
    assert "restart on the rest" in said


def test_a_price_laid_over_the_file_changes_the_cost() -> None:
    arguments = ("--model", "gpt-1.3b", "--cluster", "dgx-a100-40", "--workers", 8, "--tokens", 1e10, "--top", 1)
    plain, free = call(*arguments), call(*arguments, "--cluster-set", "price.device_hour=0")
    assert "0.00 USD" in free
    assert "0.00 USD" not in plain


def test_help_and_the_budget_plan_are_where_they_were() -> None:
    assert "--available-tokens" in call("--help")
    assert "Candidates for" in call("--flops", "1e18")


def test_a_study_by_the_cost_model_is_told_and_goes_on(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    arguments = ("tune", "run.toml", "--cluster", "laptop", "--workers", 4, "--simulate", "--folder", "study")
    first = call(*arguments, "--trials", 3)
    assert re.search(r"best of 3 trials, \d+ layouts: ", first)
    more = call(*arguments, "--trials", 5, "--write", "tuned.toml")
    assert [line.split()[0] for line in more.splitlines()[:2]] == ["4", "5"]
    assert len((place / "study" / "trials.jsonl").read_text(encoding="utf-8").splitlines()) == 5
    assert tomllib.loads((place / "tuned.toml").read_text(encoding="utf-8"))["train"]["steps"] == 2


@pytest.mark.slow
def test_a_study_by_real_runs_finds_a_layout_that_ran(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    said = call(
        "tune", "run.toml", "--cluster", "laptop", "--workers", 2, "--trials", 2, "--steps", 1, "--folder", "study"
    )
    trials = [json.loads(line) for line in (place / "study" / "trials.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [trial["outcome"]["status"] for trial in trials] == ["ok", "ok"], trials
    assert "best of 2 trials" in said
