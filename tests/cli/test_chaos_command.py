"""`resilin chaos`: a recorded trace happens again, and what it was is told."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

COMMAND = [sys.executable, "-m", "resilin", "chaos", "run.toml", "--workers", "3", "train.micro_batch_size=1"]


def chaos(place: Path, environment: Mapping[str, str], *arguments: str) -> tuple[int, str]:
    done = subprocess.run(
        [*COMMAND, *arguments], cwd=place, env=environment, text=True, capture_output=True, timeout=280
    )
    return done.returncode, done.stdout + done.stderr


@pytest.mark.slow
def test_a_recorded_trace_happens_again_and_each_blow_is_told(workplace: Path, environment: Mapping[str, str]):
    blows = [
        {"step": 2, "after": 0.01, "what": "kill", "whom": 0.4},
        # Long after the first, in whose place another worker joins: nothing else changes then.
        {"step": 100, "after": 0.0, "what": "slow", "whom": 0.0, "seconds": 0.3, "share": 0.7},
    ]
    (workplace / "trace.json").write_text(json.dumps({"blows": blows}))
    more = ("log.live=false", "train.steps=120", "evaluation.every=0", "checkpoint.every=0")
    code, told = chaos(workplace, environment, "--replay", "trace.json", "--folder", "runs/again", *more)
    assert code == 0, told
    for said in ("1 kill, 1 slow", "steps lost", "after step 2: kill, worker 1", "nothing had to change", "kept"):
        assert said in told
    written = json.loads((workplace / "runs/again/chaos.json").read_text())
    assert [(one["what"], one["members"]) for one in written["fell"]] == [("kill", [1]), ("slow", [0])]
    assert [one["step"] for one in written["blows"]] == [2, 100]


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (("--kinds", "kill,burn"), "'burn' is none of kill, stop, slow, partition, drain, add"),
        (("--replay", "nothing.json"), "holds no list of blows"),
    ],
)
def test_what_makes_no_sense_is_refused(
    arguments: tuple[str, ...], why: str, workplace: Path, environment: Mapping[str, str]
):
    code, told = chaos(workplace, environment, *arguments)
    assert code == 2
    assert why in " ".join(told.split())
