"""What a run tells a source when it builds it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from resilin.config import Settings

if TYPE_CHECKING:
    from resilin.nouns import Source

Split = Literal["train", "validation"]


@dataclass(frozen=True, slots=True)
class SourceContext:
    """The part of a run that a source depends on.

    Attributes:
        seed: the run's seed; it keys the order of the samples, never the validation split.
        split: "train" for the endless or repeated stream; "validation" for the fixed held-out batches.
        batch_size: slots of a step.
        folder: of the run, for what a source writes down; None where nothing is kept.
    """

    seed: int = 0
    split: Split = "train"
    batch_size: int = 1
    folder: Path | None = None


class SourceSettings(Settings):
    """Settings of any source; a subclass says what the source is and how to build it."""

    def build(self, context: SourceContext) -> Source:
        """The source these settings describe."""
        raise TypeError(f"{type(self).__name__} has no build(context) method; a source's settings must define it")
