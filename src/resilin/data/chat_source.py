"""Conversations as a source."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field, model_validator

from resilin.data.chat import TrainOn
from resilin.data.chat_templates import find_template
from resilin.data.file_source import FileSourceSettings
from resilin.data.mix_rows import parse_mix, write_mix
from resilin.data.packed import PackedSource
from resilin.data.rows import Packing
from resilin.data.settings import SourceContext
from resilin.data.tokenize_options import TokenizeOptions
from resilin.data.tokenizer import Tokenizer


class ChatSource(FileSourceSettings):
    """Conversations: only what the assistant wrote is learnt."""

    packing: Packing = "documents"
    """`documents` packs whole conversations; `pad` gives each a row; `stream` cuts them anywhere."""
    separate_documents: bool = True
    """Attention stays inside a conversation."""
    paths: tuple[str, ...] = ()
    """Files, folders, glob patterns, or data sets saved by `datasets`, in order."""
    mixer: tuple[str, ...] = ()
    """Instead of `paths`: names and amounts in turn, such as ["a.jsonl", "1.0", "b.jsonl", "2000"]."""
    mixer_seed: Annotated[int, Field(ge=0)] = 42
    """Which rows an amount takes."""
    messages_key: str = "messages"
    """Where the list of messages stands."""
    train_on: TrainOn = "assistant"
    """Learn what the assistant wrote, only its last turn, or every token."""
    chat_template: Path | None = None
    """`tulu`, `chatml` or a Jinja file, instead of the tokenizer's own template."""

    @model_validator(mode="after")
    def _one_kind_of_input(self) -> ChatSource:
        if bool(self.paths) == bool(self.mixer):
            raise ValueError("should have either paths or mixer")
        if self.mixer:
            parse_mix(self.mixer)
        return self

    def build(self, context: SourceContext) -> PackedSource:
        """The source of one split; a mix is first written to the cache, under a name made of its contents."""
        if not self.mixer:
            return super().build(context)
        path = write_mix(parse_mix(self.mixer), self.mixer_seed, self.cache, format=self.format, split=self.split)
        # A row that is there several times stays on one side of the split only where the split is a file of its own.
        return self.model_copy(update={"paths": (str(path),), "mixer": (), "format": None}).build(context)

    def options(self) -> TokenizeOptions:
        """How the conversations become tokens."""
        return TokenizeOptions(
            kind="chat", key=self.messages_key, train_on=self.train_on, on_error=self.on_error, parse_special=True
        )

    def made_tokenizer(self) -> Tokenizer:
        """The tokenizer, with the given template in place of its own."""
        made = super().made_tokenizer()
        if self.chat_template is None:
            return made
        return Tokenizer(made.json, {**made.config, "chat_template": find_template(str(self.chat_template))})
