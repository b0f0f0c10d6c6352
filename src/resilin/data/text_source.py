"""Plain text as a source: files, JSONL, Parquet, and data sets that `datasets` saved."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from resilin.data.file_source import FileSourceSettings
from resilin.data.tokenize_options import TokenizeOptions


class TextSource(FileSourceSettings):
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
