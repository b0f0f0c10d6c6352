"""The source of runs that take seconds: bytes of a text file, a part of it held out."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def text_source(path: Path) -> dict[str, Any]:
    """The `[source]` of settings."""
    return {
        "paths": [str(path)],
        "sequence_length": 16,
        "tokenizer": {"kind": "bytes"},
        "held_out": {"by": "tail"},
    }
