"""What became of the input of a tokenising run."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from resilin.data.errors import Problem

_EXAMPLES = 20


@dataclass(slots=True)
class Report:
    """What became of the input.

    Attributes:
        skipped: documents (or lines) left out, by the kind of flaw.
        examples: the first of them, with place and reason.
        blank: empty lines and documents.
        left_out: files in the given folders whose ending is of no known format.
        reused: the shards were there already.
    """

    skipped: Counter[str] = field(default_factory=Counter)
    examples: list[dict[str, str]] = field(default_factory=list)
    blank: int = 0
    left_out: int = 0
    reused: bool = False

    def add(self, problem: Problem, name: str) -> None:
        """Count a flaw; its place is recorded by the file's name in the index, not by this machine's path."""
        self.skipped[problem.kind] += 1
        if len(self.examples) < _EXAMPLES:
            self.examples.append({"where": name, "what": problem.what})

    def merge(self, entry: dict[str, Any]) -> None:
        """Add the counts of one chunk."""
        self.skipped.update(entry["skipped"])
        self.examples = (self.examples + entry["examples"])[:_EXAMPLES]
        self.blank += entry["blank"]

    def summary(self) -> str:
        """One line for people; "" where nothing was left out."""
        parts = [f"{count} x {kind}" for kind, count in sorted(self.skipped.items())]
        text = f"skipped {sum(self.skipped.values())}: {', '.join(parts)}" if parts else ""
        if self.left_out:
            text += ("; " if text else "") + f"{self.left_out} files of unknown format left out"
        return text
