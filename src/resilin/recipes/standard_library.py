"""The text of the running Python's standard library, byte by byte: real data that every machine has."""

from __future__ import annotations

import hashlib
import os
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import numpy as np
from pydantic import Field

from resilin.data.errors import DataError
from resilin.data.packed import PackedSettings, PackedSource
from resilin.data.settings import SourceContext
from resilin.data.shards import TokenShards
from resilin.recipes.byte_text import byte_document, byte_shards, whole_documents

_LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}


def library_files(folder: Path) -> list[Path]:
    """The library's modules in an order that a cut leaves varied: by the hash of their path inside it."""
    found = []
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if name not in _LEFT_OUT]
        found += [Path(parent) / name for name in names if name.endswith(".py")]
    return sorted(found, key=lambda path: hashlib.sha256(path.relative_to(folder).as_posix().encode()).digest())


def _texts(files: list[Path]) -> Iterator[bytes]:
    for path in files:
        raw = path.read_bytes()
        try:
            raw.decode("utf-8")
        except UnicodeDecodeError:
            continue  # a handful of modules are in other encodings
        yield raw


class StandardLibrary(PackedSettings):
    """Modules of Python's own standard library (PSF licence), one token a byte, one document a module."""

    bytes: Annotated[int, Field(gt=0)] = 4_000_000
    """How much text to take, whole modules only."""
    cache: Path = Path(".data")
    """Where the token shards are kept; they are written once."""

    def build(self, context: SourceContext) -> PackedSource:
        """The source of one split; the shards are made on first use."""
        return self.packed(self.shards(), context)

    def shards(self) -> TokenShards:
        """The token shards, written where they are missing.

        Raises:
            DataError: for a Python without its library's source.
        """
        folder = Path(sysconfig.get_paths()["stdlib"])
        files = library_files(folder)
        if not files:
            raise DataError(f"{folder}: this Python has no library source (*.py) to train on")
        listing = [f"{path.relative_to(folder).as_posix()} {path.stat().st_size}" for path in files]
        name = hashlib.sha256("\n".join([sys.version, str(self.bytes), *listing]).encode()).hexdigest()[:16]
        target = self.cache / f"standard-library-{name}"
        return self.written(files, target)

    def written(self, files: list[Path], target: Path) -> TokenShards:
        """Token shards of these files in that folder."""
        texts = whole_documents(_texts(files), self.bytes)
        return byte_shards(target, (byte_document(np.frombuffer(raw, np.uint8)) for raw in texts))
