"""What a run asks of the place where its checkpoints are kept."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from resilin.checkpoint.storage import Location
from resilin.nouns import State


@dataclass(frozen=True)
class SavedCheckpoint:
    """A checkpoint that is complete on disk.

    Attributes:
        step: steps committed in it.
        path: its folder, or URL.
        bytes: its size.
        seconds: how long saving took.
        pruned: steps whose checkpoints were removed afterwards.
    """

    step: int
    path: Location
    bytes: int
    seconds: float
    pruned: tuple[int, ...]


class CheckpointStore(Protocol):
    """Keeps states by step. What `save` has returned survives every later failure."""

    def save(self, step: int, tree: Mapping[str, Any]) -> SavedCheckpoint:
        """Keep a tree of dicts and lists with tensors and JSON values at its leaves."""

    def steps(self) -> list[int]:
        """The steps that can be loaded, ascending."""

    def latest(self) -> int | None:
        """The last of them, or None."""

    def load(self, step: int, device: torch.device | str = "cpu", *, parts: Collection[str] | None = None) -> State:
        """The tree of a step; with `parts`, only these of its top-level keys."""
