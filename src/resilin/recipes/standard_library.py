"""The text of the running Python's standard library, byte by byte: real data that every machine has."""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
import sysconfig
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, cast

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from resilin.data.errors import DataError
from resilin.data.packed import PackedSettings, PackedSource
from resilin.data.settings import SourceContext
from resilin.data.shards import INDEX_FILE, TokenShards
from resilin.data.train_tokenizer import SPECIAL, byte_tokenizer
from resilin.data.write_shards import write_documents

_LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}


def library_files(folder: Path) -> list[Path]:
    """The library's modules in an order that a cut leaves varied: by the hash of their path inside it."""
    found = []
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if name not in _LEFT_OUT]
        found += [Path(parent) / name for name in names if name.endswith(".py")]
    return sorted(found, key=lambda path: hashlib.sha256(path.relative_to(folder).as_posix().encode()).digest())


def _documents(files: list[Path], limit: int) -> Iterator[NDArray[np.int64]]:
    """Each module's ids as `byte_tokenizer` numbers them (byte b is b + 4), and the end of the text (0)."""
    taken = 0
    for path in files:
        raw = path.read_bytes()
        try:
            raw.decode("utf-8")
        except UnicodeDecodeError:
            continue  # a handful of modules are in other encodings
        if taken and taken + len(raw) > limit:
            continue
        taken += len(raw)
        yield np.append(np.frombuffer(raw, np.uint8).astype(np.int64) + len(SPECIAL), 0)


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
        if not (target / INDEX_FILE).exists():
            self._write(files, target)
        return TokenShards(target)

    def _write(self, files: list[Path], target: Path) -> None:
        tokenizer = byte_tokenizer()
        self.cache.mkdir(parents=True, exist_ok=True)
        # Written aside and renamed: several processes may want the same data at once.
        aside = Path(tempfile.mkdtemp(prefix=f"{target.name}.", dir=self.cache))
        # The documents are arrays of ids, which the writer takes like any sequence.
        documents = cast(Iterable[Sequence[int]], _documents(files, self.bytes))
        write_documents(aside, documents, tokenizer.vocab_size, tokenizer=tokenizer)
        try:
            aside.rename(target)
        except OSError:
            shutil.rmtree(aside)
            if not (target / INDEX_FILE).exists():
                raise
