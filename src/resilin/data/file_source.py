"""Sources over ordinary files: text, JSONL, Parquet, and data sets that `datasets` saved.

The files are tokenised once, into a cache folder named by their contents, and read as token shards from then on.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from pydantic import Field

from resilin.data.inputs import Format, find_inputs
from resilin.data.packed import PackedSettings, PackedSource
from resilin.data.progress import tokenize_progress
from resilin.data.settings import SourceContext
from resilin.data.shards import TokenShards
from resilin.data.tokenize import tokenize_files
from resilin.data.tokenize_options import OnError, TokenizeOptions
from resilin.data.tokenizer import Tokenizer
from resilin.data.tokenizer_settings import TokenizerSettings

Paths = Annotated[tuple[str, ...], Field(min_length=1)]


class FileSourceSettings(PackedSettings):
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
        parts = [
            tokenizer.digest,
            json.dumps(options.contents(), sort_keys=True),
            *(file.fingerprint() for file in inputs.files),
        ]
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
