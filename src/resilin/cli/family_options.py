"""What commands on nested models share: which sizes a model has, and the text they look at."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from resilin.nested.rungs import SizeRecord
    from resilin.nouns import Batch
    from resilin.run.open_model import OpenedModel

SIZES, DATA = "The sizes", "Held-out text"


@dataclass(frozen=True, slots=True)
class SizeOptions:
    """Which sizes a model has, where neither its run nor its folder tells."""

    granularities: Annotated[
        str | None,
        typer.Option(
            help="Sizes, such as 0.25,0.5,1. Default: those of the run, or of nested.json.", rich_help_panel=SIZES
        ),
    ] = None
    targets: Annotated[
        str | None, typer.Option(help="What they cut: ffn, heads or ffn,heads.", rich_help_panel=SIZES)
    ] = None

    def known(self, path: Path, opened: OpenedModel) -> SizeRecord | None:
        """What is known of the sizes; those given here count as trained only where the model was trained at them."""
        from resilin.config.errors import UserError
        from resilin.nested.record import NestRecord
        from resilin.nested.trained_sizes import trained_sizes

        run = opened.run
        objective, folder = (None, None) if run is None else (run.settings().objective, run.path)
        told = trained_sizes(opened.model.settings, objective, folder)
        if told is None and path.is_dir():
            told = NestRecord.read(path)
        if self.granularities is None and self.targets is None:
            return told
        try:
            sizes = tuple(_number(one) for one in (self.granularities or "0.125,0.25,0.5,1").split(","))
            cuts = tuple(one.strip() for one in (self.targets or "ffn").split(","))
            if not set(cuts) <= {"ffn", "heads"}:
                raise ValueError(f"--targets {self.targets}: expected ffn, heads or ffn,heads")
            known = told if isinstance(told, NestRecord) and told.trained else None
            trained = known is not None and cuts == known.targets and set(sizes) <= set(known.granularities)
            return NestRecord(sizes, cuts, trained=trained)  # type: ignore[arg-type]
        except ValueError as error:
            raise UserError(str(error)) from None

    def record(self, path: Path, opened: OpenedModel) -> SizeRecord:
        """The sizes.

        Raises:
            UserError: nothing tells them.
        """
        from resilin.config.errors import UserError

        known = self.known(path, opened)
        if known is None:
            raise UserError(
                f"{opened.description}: was not trained as a nested model, or nothing tells at which sizes: name them "
                "with --granularities 0.25,0.5,1 (sizes that were not trained are marked as such)"
            )
        return known


def _number(text: str) -> int | float:
    try:
        value = float(text)
    except ValueError:
        raise ValueError(f"--granularities: {text.strip()!r} is no number: write 0.25,0.5,1 or 128,256,512") from None
    return int(value) if value == int(value) else value


@dataclass(frozen=True, slots=True)
class TextOptions:
    """What is read."""

    text: Annotated[list[Path] | None, typer.Option(help="Text files.", rich_help_panel=DATA)] = None
    data: Annotated[list[Path] | None, typer.Option(help="Token shards.", rich_help_panel=DATA)] = None
    window: Annotated[
        int | None, typer.Option(min=1, help="Tokens of a row. Default: the model's positions.", rich_help_panel=DATA)
    ] = None
    limit: Annotated[
        int, typer.Option(min=1, help="At most so many batches of about 4096 tokens.", rich_help_panel=DATA)
    ] = 16

    def batches(self, opened: OpenedModel, *, own: bool) -> list[Batch] | None:
        """The batches; of a run alone, where `own` is set, those of its held-out data; None where there are none."""
        from itertools import islice

        found = list(islice(self._all(opened, own), self.limit))
        return found or None

    def _all(self, opened: OpenedModel, own: bool) -> Iterator[Batch]:
        from resilin.config.errors import UserError
        from resilin.evaluate.perplexity import read_text
        from resilin.nested.text_batches import text_batches
        from resilin.run.held_out import held_out_source, shard_source

        most = opened.model.settings.max_positions
        window = self.window or min(most, 1024)
        if window > most:
            raise UserError(f"--window {window} is more than the {most} positions of the model")
        for path in self.text or ():
            yield from text_batches(opened.needed_tokenizer().encode(read_text(path), parse_special=False), window)
        for path in self.data or ():
            source = shard_source(path, opened.model, opened.tokenizer, window, 4096, "all")
            for step in range(len(source)):
                yield source.fetch(step, range(source.slots(step)))
        if not self.text and not self.data and own and opened.run is not None:
            held_out = held_out_source(opened.run)
            for step in range(len(held_out)):  # type: ignore[arg-type]
                yield held_out.fetch(step, range(held_out.slots(step)))
