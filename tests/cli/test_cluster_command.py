"""`resilin cluster`: the workers of a run that is going on, from another terminal."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

FOLDER = "runs/elastic"


@pytest.fixture
def job(workplace: Path, environment: Mapping[str, str]) -> Iterator[subprocess.Popen[str]]:
    command = [
        sys.executable, "-m", "resilin", "train", "run.toml", "--workers", "2", "--folder", FOLDER, "log.live=false",
        "cluster.elastic=true", "train.micro_batch_size=1", "train.steps=1000000", "evaluation.every=0",
        "checkpoint.every=0",
    ]  # fmt: skip
    process = subprocess.Popen(
        command, cwd=workplace, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    yield process
    if process.poll() is None:
        process.kill()
        process.communicate()


def resilin(place: Path, environment: Mapping[str, str], *arguments: str) -> tuple[int, str]:
    command = [sys.executable, "-m", "resilin", *arguments]
    done = subprocess.run(command, cwd=place, env=environment, text=True, capture_output=True, timeout=100)
    return done.returncode, done.stdout + done.stderr


def members(place: Path) -> list[list[int]]:
    """After every change, who was there."""
    events = place / FOLDER / "events.jsonl"
    lines = events.read_text(encoding="utf-8").splitlines() if events.exists() else []
    told = [json.loads(line) for line in lines if '"what":"change"' in line]
    return [one["facts"]["members"] for one in told]


def until_members(place: Path, wanted: list[int]) -> None:
    end = time.monotonic() + 200
    while members(place)[-1:] != [wanted]:
        assert time.monotonic() < end, f"{members(place)} and not {wanted}"
        time.sleep(0.1)


def test_workers_are_listed_added_let_go_and_killed_while_a_run_goes_on(
    job: subprocess.Popen[str], workplace: Path, environment: Mapping[str, str]
):
    until_members(workplace, [0, 1])
    assert resilin(workplace, environment, "cluster", "add", FOLDER)[1] == "started worker 2\n"
    until_members(workplace, [0, 1, 2])
    code, told = resilin(workplace, environment, "cluster", "status", FOLDER)
    assert code == 0
    assert told.startswith("running, step ")
    assert [line.split()[0] for line in told.splitlines()[2:] if line[:1].isdigit()] == ["0", "1", "2"]
    assert all(name in told.splitlines()[1] for name in ("stage", "layers", "slots"))
    assert resilin(workplace, environment, "cluster", "drain", FOLDER, "0") == (0, "worker 0 leaves\n")
    until_members(workplace, [1, 2])
    assert resilin(workplace, environment, "cluster", "remove", FOLDER, "1") == (0, "killed worker 1\n")
    until_members(workplace, [2])
    code, told = resilin(workplace, environment, "cluster", "drain", FOLDER, "1")
    assert code == 2
    assert "there is no worker 1; there are 2" in told
    job.send_signal(2)  # Ctrl-C: the run saves and ends
    out, _ = job.communicate(timeout=200)
    assert job.returncode == 130, out
    assert "run interrupted at step" in out
    assert "the same command with --resume" in out
    assert len(list((workplace / FOLDER / "checkpoints").glob("step-*"))) == 1
    # What it leaves behind is a run like any other.
    code, told = resilin(workplace, environment, "generate", FOLDER, "--prompt", "import", "--max-new-tokens", "4")
    assert code == 0, told


def test_where_no_run_goes_on_that_is_said(workplace: Path, environment: Mapping[str, str]):
    code, told = resilin(workplace, environment, "cluster", "status", "runs/none")
    assert code == 2
    assert "runs/none: no elastic run is going on here" in told


def test_workers_that_others_started_are_not_started_again(workplace: Path, environment: Mapping[str, str]):
    others = {**environment, "RANK": "0", "WORLD_SIZE": "2"}
    code, told = resilin(workplace, others, "train", "run.toml", "cluster.elastic=true", "--workers", "2")
    assert code == 2
    assert "this process is worker 0 of 2 already: torchrun or srun started it" in told
