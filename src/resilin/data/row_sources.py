"""Settings of sources over rows of files: which rows, which of them are held out, and in which order they come."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from resilin.data.chat_templates import find_template
from resilin.data.errors import DataError
from resilin.data.inputs import Format
from resilin.data.mix_rows import mix, parse_mix
from resilin.data.order import BatchSizes, SampleOrder
from resilin.data.permutation import Permutation
from resilin.data.row_files import Row, read_rows
from resilin.data.settings import SourceContext, SourceSettings
from resilin.data.split import HeldOut
from resilin.data.tokenizer import Tokenizer
from resilin.keys import hash64


class RowSourceSettings(SourceSettings):
    """What sources over rows have in common."""

    paths: tuple[str, ...] = ()
    """Files of rows (.jsonl, .parquet, .arrow), folders, patterns or saved data sets, in order."""
    mixer: tuple[str, ...] = ()
    """Instead of `paths`: names and amounts in turn, such as ["a.jsonl", "1.0", "b.jsonl", "2000"]."""
    mixer_seed: Annotated[int, Field(ge=0)] = 42
    """Which rows an amount takes."""
    validation_paths: tuple[str, ...] = ()
    """Files of their own for validation; left out, `held_out` says what is set apart."""
    format: Format | None = None
    """How files are read; left out, by their ending."""
    split: str = "train"
    """Which split of a saved data set that has several."""
    tokenizer: Path
    """A tokenizer.json or a folder with one: usually the model's own."""
    chat_template: Path | None = None
    """`tulu`, `chatml` or a Jinja file, instead of the tokenizer's own template."""
    shuffle: bool = True
    """Read the rows in a new random order each epoch; False: in order."""
    epochs: Annotated[int, Field(ge=1)] | None = None
    """Passes over the data, after which the source ends; left out, it goes on for ever."""
    held_out: HeldOut = HeldOut()
    """The validation split; rows with the same prompt stay on one side."""
    batch_changes: tuple[tuple[int, int], ...] = ()
    """(step, batch size) pairs: batch sizes that hold from a later step on."""
    pad: Literal["batch", "length"] = "batch"
    """Fill rows up to the longest of the fetched samples, or always to the greatest length (needed in a `Mix`)."""

    @model_validator(mode="after")
    def _one_kind_of_input(self) -> RowSourceSettings:
        if bool(self.paths) == bool(self.mixer):
            raise ValueError("should have either paths or mixer")
        if self.mixer:
            parse_mix(self.mixer)
        return self

    def template(self) -> str | None:
        """The given template, or None for the tokenizer's own."""
        return None if self.chat_template is None else find_template(str(self.chat_template))

    def loaded_tokenizer(self) -> Tokenizer:
        """The tokenizer, with the given template in place of its own."""
        made, template = Tokenizer.load(self.tokenizer), self.template()
        return made if template is None else Tokenizer(made.json, {**made.config, "chat_template": template})

    def rows(self, context: SourceContext) -> tuple[list[Row], bool]:
        """The rows, and whether they are only those of the context's split."""
        if self.validation_paths and context.split == "validation":
            return list(read_rows(self.validation_paths, format=self.format, split=self.split)), True
        if self.mixer:
            entries = [(entry.name, entry.amount) for entry in parse_mix(self.mixer)]
            rows = mix(entries, self.mixer_seed, format=self.format, split=self.split)
        else:
            rows = list(read_rows(self.paths, format=self.format, split=self.split))
        return rows, bool(self.validation_paths)

    def ordered(
        self, prompts: Sequence[str], context: SourceContext, whole: bool
    ) -> tuple[NDArray[np.int64], SampleOrder]:
        """Which rows belong to the context's split, and the order in which they come.

        Args:
            prompts: of each row, something equal for equal prompts.
            context: of the run.
            whole: all rows are of this split.

        Raises:
            DataError: there are too few prompts to hold one out and keep one.
        """
        training = context.split == "train"
        held = np.zeros(len(prompts), bool) if whole else held_out_rows(prompts, self.held_out)
        mine = np.flatnonzero(held != training) if not whole else np.arange(len(prompts))
        if not len(mine):
            raise DataError(f"the {context.split} split has no rows: set held_out.fraction, or give validation_paths")
        order = SampleOrder(
            rows=len(mine),
            seed=context.seed if training else hash64("validation order", self.held_out.seed),
            batch_sizes=BatchSizes(context.batch_size, self.batch_changes if training else ()),
            shuffle=self.shuffle,
            epochs=self.epochs if training else 1,
        )
        return mine, order


def held_out_rows(prompts: Sequence[str], settings: HeldOut) -> NDArray[np.bool_]:
    """(rows,) True for those of the validation split: whole groups of rows with one prompt, or the last rows.

    Raises:
        DataError: for a fraction outside [0, 1), or a single prompt.
    """
    if not 0.0 <= settings.fraction < 1.0:
        raise DataError(f"held_out.fraction = {settings.fraction}: should be at least 0 and below 1")
    held = np.zeros(len(prompts), bool)
    if settings.fraction == 0.0:
        return held
    numbers: dict[str, int] = {}
    groups = np.fromiter((numbers.setdefault(prompt, len(numbers)) for prompt in prompts), np.int64, len(prompts))
    count = len(numbers)
    if count < 2:
        raise DataError(
            f"{count} prompt: none can be held out; give more rows, or set held_out.fraction=0 and validation_paths"
        )
    size = min(count - 1, max(1, round(count * settings.fraction)))
    if settings.by == "tail":
        return groups >= count - size
    chosen = Permutation(count, hash64("held out", settings.seed))(np.arange(size))
    marked: NDArray[np.bool_] = np.isin(groups, chosen)
    return marked
