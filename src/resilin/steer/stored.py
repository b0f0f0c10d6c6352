"""Decisions on disk: each selection as a JSON file named by what it depended on, and a line for every decision."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from resilin.nouns import State

_TENSOR = "$tensor"


def to_json(tree: Any) -> Any:
    """A state as JSON values; a tensor becomes its format and its numbers."""
    if isinstance(tree, Tensor):
        kind = str(tree.dtype).removeprefix("torch.")
        return {_TENSOR: kind, "shape": list(tree.shape), "values": tree.detach().cpu().flatten().tolist()}
    if isinstance(tree, dict):
        return {key: to_json(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [to_json(value) for value in tree]
    return tree


def from_json(tree: Any) -> Any:
    """What `to_json` was given, to the bit."""
    if isinstance(tree, dict) and _TENSOR in tree:
        return torch.tensor(tree["values"], dtype=getattr(torch, tree[_TENSOR])).reshape(tree["shape"])
    if isinstance(tree, dict):
        return {key: from_json(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [from_json(value) for value in tree]
    return tree


@dataclass(frozen=True, slots=True)
class Decisions:
    """The decisions of a run, in its folder.

    Attributes:
        folder: of the run; None keeps nothing.
        name: of the files: `<name>.jsonl` and `<name>/`.
    """

    folder: Path | None
    name: str

    def file(self, step: int, key: str) -> Path | None:
        """Where a decision is kept; None where nothing is."""
        return None if self.folder is None else self.folder / self.name / f"step-{step:08d}-{key}.json"

    def find(self, step: int, key: str) -> State | None:
        """A stored decision of this step with this fingerprint; None where there is none, or it is broken."""
        path = self.file(step, key)
        if path is None or not path.is_file():
            return None
        try:
            found: State = from_json(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None  # a file cut short: the decision is made again
        return found

    def keep(self, step: int, key: str, decision: State) -> None:
        """Store a decision; the file is whole or absent."""
        path = self.file(step, key)
        if path is None:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        temporary.write_text(json.dumps(to_json(decision)), encoding="utf-8")
        temporary.replace(path)

    def log(self, **line: Any) -> None:
        """Append a line to `<name>.jsonl`; after a resume the later line of a step counts."""
        if self.folder is None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / f"{self.name}.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
