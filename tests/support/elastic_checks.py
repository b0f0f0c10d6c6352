"""What an elastic run has left behind, beside what one process has."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from elastic_runs import STEPS

from resilin.checkpoint.folder import CheckpointFolder


def states(folder: Path, step: int) -> dict[str, Any]:
    return CheckpointFolder(folder / "checkpoints").load(step)


def events(folder: Path, kind: str) -> list[dict[str, Any]]:
    lines = (folder / "events.jsonl").read_text().splitlines()
    return [told for told in map(json.loads, lines) if told["event"] == kind]


def equal(left: Any, right: Any) -> bool:
    if isinstance(left, torch.Tensor):
        return torch.equal(left, right)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(equal(left[key], right[key]) for key in left)
    return left == right


def check_same(folder: Path, other: Path, steps: int = STEPS) -> None:
    """Losses of all steps, evaluations, and the whole state of the last checkpoint, to the bit."""
    for kind, fields in (("step", ("step", "loss", "grad_norm")), ("eval", ("step", "metrics"))):
        found, expected = ([[e[f] for f in fields] for e in events(at, kind)] for at in (folder, other))
        assert found == expected, kind
        assert found, kind
    mine, theirs = states(folder, steps), states(other, steps)
    for part in ("model", "optimizer", "run"):
        one, two = mine[part], theirs[part]
        if part == "optimizer":
            one, two = one["parameters"], two["parameters"]
        assert equal(one, two), part


def check_close(folder: Path, other: Path) -> None:
    """Losses of all steps, evaluations and the last state, but for rounding."""
    for kind, read in (("step", lambda e: e["loss"]), ("eval", lambda e: e["metrics"]["loss"])):
        found, expected = ([read(e) for e in events(at, kind)] for at in (folder, other))
        assert len(found) == len(expected) > 0
        assert found == pytest.approx(expected, rel=1e-4), kind
    mine, theirs = states(folder, STEPS), states(other, STEPS)
    assert mine["model"].keys() == theirs["model"].keys()
    for name, weight in theirs["model"].items():
        assert (mine["model"][name] - weight).abs().max() < 2e-4, name
    for name, state in theirs["optimizer"]["parameters"].items():
        found = mine["optimizer"]["parameters"][name]
        for what, value in state.items():
            assert (found[what] - value).norm() <= 1e-2 * value.norm(), (name, what)


def changes(folder: Path) -> list[dict[str, Any]]:
    return [told["facts"] for told in events(folder, "cluster") if told["what"] == "change"]
