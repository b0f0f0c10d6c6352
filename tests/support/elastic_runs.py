"""Small elastic runs: their settings, and what is compared."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tiny_text import text_source

from resilin.checkpoint.folder import CheckpointFolder
from resilin.cluster.elastic_job import JobEnded
from resilin.cluster.faults import Fault
from resilin.cluster.local import worker_command
from resilin.config import parse_settings
from resilin.run.elastic_start import launch
from resilin.run.settings import RunSettings

STEPS = 14


def text_at(folder: Path) -> Path:
    """A file to learn from."""
    path = folder / "text.txt"
    path.write_text("the quick brown fox jumps over the lazy dog. " * 400)
    return path


def settings_of(text: Path, **over: Any) -> RunSettings:
    tree = {
        "source": text_source(text),
        "model": {"hidden_size": 32, "layers": 2, "heads": 4, "kv_heads": 2, "mlp_size": 48, "dropout": 0.1},
        "optimizer": {"lr": 3e-3},
        "train": {"steps": STEPS, "batch_size": 8, "micro_batch_size": 1, "threads": 1, "device": "cpu"},
        "precision": {"compute": "fp32"},
        "parallel": {"workers": 3, "timeout": 60},
        "cluster": {"elastic": True},
        "evaluation": {"every": 5, "batches": 3},
        "checkpoint": {"every": 4, "keep_last": 50},
        "log": {"tensorboard": False, "live": False},
    }
    for section, values in over.items():
        tree[section] = {**tree.get(section, {}), **values}
    return parse_settings(RunSettings, tree, "test")


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


def changes(folder: Path) -> list[dict[str, Any]]:
    return [told["facts"] for told in events(folder, "cluster") if told["what"] == "change"]


def go(settings: RunSettings, folder: Path, faults: Sequence[Fault] = (), **more: Any) -> JobEnded:
    return launch(settings, folder, worker_command(), faults=faults, **more)
