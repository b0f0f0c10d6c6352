"""Sources over ordinary files: text, JSONL, Parquet, and data sets that `datasets` saved.

The files are tokenised once, into a cache folder named by their contents, and read as token shards from then on.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from pydantic import Field

from resilin.data.chat import TrainOn
from resilin.data.errors import DataError
from resilin.data.inputs import Format, find_inputs
from resilin.data.packed import PackedSettings, PackedSource
from resilin.data.progress import tokenize_progress
from resilin.data.rows import Packing
from resilin.data.settings import SourceContext
from resilin.data.shards import TokenShards
from resilin.data.tokenize import OnError, TokenizeOptions, tokenize_files
from resilin.data.tokenizer import Tokenizer
from resilin.data.tokenizer_settings import TokenizerSettings

Paths = Annotated[tuple[str, ...], Field(min_length=1)]


class FileSettings(PackedSettings):
    """What sources over files have in common."""

    paths: Paths
    """Files, folders, glob patterns, or data sets saved by `datasets`, in order."""
    validation_paths: tuple[str, ...] = ()
    """Files of their own for validation; left out, `held_out` says what is set apart."""
    format: Format | None = None
    """How files are read; left out, by their ending."""
    split: str = "train"
    """Which split of a saved data set that has several."""
    tokenizer: TokenizerSettings = TokenizerSettings()
    """Where token ids come from."""
    on_error: OnError = "stop"
    """Stop at the first flawed document, or leave such documents out and count them."""
    workers: int | None = None
    """Tokenising processes; left out, one for each core."""
    cache: Path = Path(".cache/resilin")
    """Where tokenised files are kept."""

    def options(self) -> TokenizeOptions:
        """How the documents become tokens."""
        raise TypeError(f"{type(self).__name__} has no options() method")

    def shards(self, paths: Sequence[str], tokenizer: Tokenizer) -> TokenShards:
        """The files of some paths as token shards, from the cache where they are there."""
        options = self.options()
        inputs = find_inputs(paths, format=self.format, split=self.split)
        parts = [tokenizer.digest, repr(options), *(file.fingerprint() for file in inputs.files)]
        name = hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]
        with tokenize_progress("tokenising") as progress:
            shards, report = tokenize_files(
                inputs, self.cache / f"shards-{name}", tokenizer, options, workers=self.workers, progress=progress
            )
        if report.summary():
            sys.stderr.write(f"resilin: {', '.join(paths)}: {report.summary()}\n")
        return shards

    def made_tokenizer(self) -> Tokenizer:
        """The tokenizer, learnt from the training files where it is not given."""
        inputs = find_inputs(self.paths, format=self.format, split=self.split)
        return self.tokenizer.make(inputs, self.options(), self.cache)

    def build(self, context: SourceContext) -> PackedSource:
        """The source of one split; tokenises on the first use."""
        tokenizer = self.made_tokenizer()
        separate = bool(self.validation_paths)
        paths = self.validation_paths if separate and context.split == "validation" else self.paths
        return self.packed(self.shards(paths, tokenizer), context, whole=separate)


class Text(FileSettings):
    """Plain text for next-token training."""

    text_key: str = "text"
    """Where the text stands in a JSONL line or a table."""
    separator: Annotated[str, Field(min_length=1)] | None = None
    """What stands between the documents of a text file; left out, each file is one document."""
    parse_special: bool = False
    """Read the text of a special token inside a document as that token."""

    def options(self) -> TokenizeOptions:
        """How the documents become tokens."""
        return TokenizeOptions(
            key=self.text_key, separator=self.separator, parse_special=self.parse_special, on_error=self.on_error
        )


class Chat(FileSettings):
    """Conversations: only what the assistant wrote is learnt."""

    packing: Packing = "documents"
    """`documents` packs whole conversations; `pad` gives each a row; `stream` cuts them anywhere."""
    separate_documents: bool = True
    """Attention stays inside a conversation."""
    messages_key: str = "messages"
    """Where the list of messages stands."""
    train_on: TrainOn = "assistant"
    """Learn what the assistant wrote, only its last turn, or every token."""
    chat_template: Path | None = None
    """A Jinja file instead of the tokenizer's own template."""

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
        if not self.chat_template.is_file():
            raise DataError(f"{self.chat_template}: no such chat template file")
        template = self.chat_template.read_text(encoding="utf-8")
        return Tokenizer(made.json, {**made.config, "chat_template": template})
