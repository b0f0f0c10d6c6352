"""A Source transform: rows are short at first and grow to their full length (a length curriculum)."""

from __future__ import annotations

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
    """Rows are cut to a length that depends on the step alone, so a resumed run cuts them alike."""

    def __init__(self, inner: Source, first: int, steps: int) -> None:
        super().__init__(inner)
        self.first, self.steps = first, steps

    def length_at(self, step: int, whole: int) -> int:
        """Tokens of a row in step `step`."""
        return min(whole, self.first + step * (whole - self.first) // self.steps) if whole > self.first else whole

    def shown(self, step: int | None, batch: Batch) -> Batch:
        """The samples, cut; whole where they are looked at outside any step."""
        whole = batch["tokens"].shape[1]
        length = whole if step is None else self.length_at(step, whole)
        return Batch(batch.slots_B, {name: field[:, :length] for name, field in batch.fields.items()})
