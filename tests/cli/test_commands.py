"""The commands as a new user meets them: real processes, real files."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from resilin.checkpoint.folder import CheckpointFolder
from resilin.cli.main import app
from resilin.config import load_settings
from resilin.run.settings import RunSettings


def commands() -> list[list[str]]:
    import typer

    root = typer.main.get_command(app)
    found: list[list[str]] = []

    def visit(command: Any, path: list[str]) -> None:
        children = getattr(command, "commands", None)
        if children:
            for name, child in children.items():
                visit(child, [*path, name])
        else:
            found.append(path)

    visit(root, [])
    return found


@pytest.mark.parametrize("path", commands(), ids=" ".join)
def test_every_command_has_help_that_says_what_it_does(path: list[str]) -> None:
    from typer.testing import CliRunner

    result = CliRunner().invoke(app, [*path, "--help"], env={"COLUMNS": "100"})
    assert result.exit_code == 0
    assert path[-1] in result.output
    assert len(result.output.splitlines()) > 8


def test_print_config_is_complete_and_reads_back_to_the_same_settings(resilin: Any, workplace: Path) -> None:
    printed = resilin("train", "run.toml", "train.steps=7", "--print-config")
    assert printed.returncode == 0, printed.stderr
    (workplace / "complete.toml").write_text(printed.stdout)
    complete = load_settings(RunSettings, workplace / "complete.toml")
    assert complete.train.steps == 7
    assert complete == load_settings(RunSettings, workplace / "run.toml", ["train.steps=7"])


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("optimzer.lr=1", "did you mean 'optimizer'"),
        ("optimizer.learning=1", "unknown key 'learning'"),
        ("train.steps=many", 'train.steps = "many"'),
        ("model.heads=5", "is not divisible by"),
        ("source.paths=['nowhere']", "nowhere"),
        ("source.use=resilin.data.text_source:TextSorce", "did you mean 'TextSource'"),
        ("train.micro_batch_size=9", "larger than batch_size (4)"),
    ],
)
def test_a_wrong_setting_is_named_with_what_was_expected(resilin: Any, override: str, expected: str) -> None:
    done = resilin("train", "run.toml", override, "--folder", "runs/wrong")
    assert done.returncode == 2
    assert expected in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr


def test_a_missing_settings_file_is_named(resilin: Any) -> None:
    done = resilin("train", "nothing.toml")
    assert done.returncode == 2
    assert "nothing.toml" in done.stderr


def test_a_finished_run_is_described_and_left_alone(resilin: Any, finished_run: Path) -> None:
    again = resilin("train", "run.toml", "--folder", str(finished_run))
    assert again.returncode == 2
    assert "--resume" in again.stderr
    shown = resilin("inspect", str(finished_run))
    assert shown.returncode == 0, shown.stderr
    assert "6 of 6" in shown.stdout
    resumed = resilin("train", "run.toml", "--folder", str(finished_run), "--resume")
    assert resumed.returncode == 0, resumed.stderr


def test_other_settings_are_not_silently_continued(resilin: Any, finished_run: Path) -> None:
    done = resilin("train", "run.toml", "optimizer.lr=0.5", "--folder", str(finished_run), "--resume")
    assert done.returncode == 2
    assert "optimizer.lr: 0.01 -> 0.5" in done.stderr


def test_inspect_tells_what_would_run(resilin: Any) -> None:
    shown = resilin("inspect", "run.toml", "model.layers=2")
    assert shown.returncode == 0, shown.stderr
    for word in ("parameters", "FLOP", "MiB", "tokens"):
        assert word in shown.stdout


def final_tensors(folder: Path) -> dict[str, torch.Tensor]:
    store = CheckpointFolder(folder / "checkpoints")
    step = store.latest()
    assert step is not None
    tree = store.load(step)
    found: dict[str, torch.Tensor] = {}

    def visit(node: Any, path: str) -> None:
        if isinstance(node, dict):
            for key, value in node.items():
                visit(value, f"{path}/{key}")
        elif isinstance(node, torch.Tensor):
            found[path] = node

    visit(tree, "")
    return found


def interrupt_after(folder: Path, step: int, workplace: Path, environment: dict[str, str], *extra: str) -> int:
    """Start a run, press Ctrl-C once it has taken `step` steps, and give back its exit code."""
    command = [sys.executable, "-m", "resilin", "train", "run.toml", "--folder", str(folder), *extra]
    process = subprocess.Popen(
        command, cwd=workplace, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    events, deadline = folder / "events.jsonl", time.monotonic() + 200
    while time.monotonic() < deadline and process.poll() is None:
        text = events.read_text() if events.exists() else ""
        if text.count('"event": "step"') + text.count('"event":"step"') >= step:
            process.send_signal(signal.SIGINT)
            break
        time.sleep(0.005)
    return process.wait(timeout=120)


def test_ctrl_c_saves_and_resume_gives_the_bits_of_an_undisturbed_run(
    resilin: Any, workplace: Path, environment: dict[str, str], tmp_path: Path
) -> None:
    steps = ["train.steps=400", "checkpoint.every=0", "evaluation.every=0"]
    whole = resilin("train", "run.toml", "--folder", str(tmp_path / "whole"), *steps)
    assert whole.returncode == 0, whole.stderr
    code = interrupt_after(tmp_path / "stopped", 5, workplace, environment, *steps)
    assert code == 130
    saved = CheckpointFolder(tmp_path / "stopped" / "checkpoints").latest()
    assert saved is not None
    assert 5 <= saved < 400
    rest = resilin("train", "run.toml", "--folder", str(tmp_path / "stopped"), "--resume", *steps)
    assert rest.returncode == 0, rest.stderr
    expected, found = final_tensors(tmp_path / "whole"), final_tensors(tmp_path / "stopped")
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)

    def losses(folder: Path) -> list[tuple[int, float]]:
        lines = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
        return [(line["step"], line["loss"]) for line in lines if line["event"] == "step"]

    assert losses(tmp_path / "whole") == losses(tmp_path / "stopped")


def test_from_training_to_text_evaluation_and_transformers(resilin: Any, finished_run: Path, workplace: Path) -> None:
    written = resilin("generate", str(finished_run), "--prompt", "import ", "--max-new-tokens", "8", "--seed", "3")
    assert written.returncode == 0, written.stderr
    assert len(written.stdout) > 0
    scored = resilin("evaluate", str(finished_run), "--text", "text/textwrap.py.txt", "--json")
    assert scored.returncode == 0, scored.stderr
    assert re.search(r"bits", scored.stdout)
    exported = resilin("export", str(finished_run), "exported")
    assert exported.returncode == 0, exported.stderr
    from transformers import AutoModelForCausalLM, AutoTokenizer

    theirs = AutoModelForCausalLM.from_pretrained(workplace / "exported")
    tokenizer = AutoTokenizer.from_pretrained(workplace / "exported")
    from resilin.run.open_model import open_model

    ours = open_model(finished_run)
    ids = torch.tensor([ours.needed_tokenizer().encode("def heapify(x):")])
    assert tokenizer("def heapify(x):", add_special_tokens=False).input_ids == ids[0].tolist()
    with torch.no_grad():
        torch.testing.assert_close(
            theirs(ids).logits, ours.model.logits(ours.model(ids).hidden_BTD), rtol=1e-5, atol=1e-5
        )


def test_a_model_that_is_not_there_is_named(resilin: Any) -> None:
    done = resilin("generate", "runs/nothing", "--prompt", "x")
    assert done.returncode == 2
    assert "runs/nothing" in done.stderr
