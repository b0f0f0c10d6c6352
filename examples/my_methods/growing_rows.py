"""A Source transform: rows are short at first and grow to their full length (a length curriculum)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from pydantic import Field

from resilin.config import component
from resilin.data.settings import SourceContext, SourceSettings
from resilin.nouns import Batch, Source
from resilin.transforms import SourceTransform


class GrowingRows(SourceSettings):
    """Train on the first tokens of each row, more of them as the run goes on."""

    first: int = Field(default=32, ge=1)
    """Tokens of a row in the first step."""
    steps: int = Field(default=100, ge=1)
    """Steps until rows have their full length."""
    source: Annotated[SourceSettings, component("resilin.data.text_source:TextSource")]
    """Where the rows come from."""

    def build(self, context: SourceContext) -> Source:
        """The inner source with rows that grow; held-out rows are always whole."""
        inner = self.source.build(context)
        return inner if context.split == "validation" else GrowingRowsSource(inner, self.first, self.steps)


class GrowingRowsSource(SourceTransform):
    """`fetch` cuts rows to a length that depends on the step alone, so a resumed run cuts them alike."""

    def __init__(self, inner: Source, first: int, steps: int) -> None:
        super().__init__(inner)
        self.first, self.steps = first, steps

    def length_at(self, step: int, whole: int) -> int:
        """Tokens of a row in step `step`."""
        return min(whole, self.first + step * (whole - self.first) // self.steps) if whole > self.first else whole

    def fetch(self, step: int, slots: Sequence[int]) -> Batch:
        """The samples of these slots, cut."""
        batch = self.inner.fetch(step, slots)
        length = self.length_at(step, batch["tokens"].shape[1])
        return Batch(batch.slots_B, {name: field[:, :length] for name, field in batch.fields.items()})
