"""Other text than Python code that every machine with Resilin has: Python's language reference, torch's C++ headers,
and what packages say of themselves.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.metadata
import importlib.util
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from resilin.data.errors import DataError
from resilin.data.packed import PackedSettings, PackedSource
from resilin.data.settings import SourceContext
from resilin.data.shards import TokenShards
from resilin.keys import hash64
from resilin.recipes.byte_text import byte_document, byte_shards, whole_documents

Texts = Sequence[bytes]
Kind = Literal["manual", "headers", "descriptions"]


def manual() -> list[bytes]:
    """The topics of `help()`: the language reference as plain English text, in a hashed order.

    Raises:
        DataError: for a Python that comes without them.
    """
    path = Path(sysconfig.get_paths()["stdlib"]) / "pydoc_data" / "topics.py"
    if not path.is_file():
        raise DataError(f"{path}: this Python comes without its language reference")
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "topics":
            topics: dict[str, str] = ast.literal_eval(node.value)
            names = sorted(topics, key=lambda name: hashlib.sha256(name.encode()).digest())
            return [topics[name].encode() for name in names]
    raise DataError(f"{path}: holds no dictionary called topics")


def headers() -> list[bytes]:
    """The C++ headers that torch installs, in a hashed order.

    Raises:
        DataError: for a torch without headers.
    """
    spec = importlib.util.find_spec("torch")
    folder = Path(spec.origin or "").parent / "include" if spec is not None else Path()
    files = sorted(
        folder.rglob("*.h"), key=lambda path: hashlib.sha256(path.relative_to(folder).as_posix().encode()).digest()
    )
    if not files:
        raise DataError(f"{folder}: this torch comes without its C++ headers")
    return [path.read_bytes() for path in files[:1000]]


def descriptions() -> list[bytes]:
    """What installed packages say of themselves (Markdown, mostly), in a hashed order.

    Raises:
        DataError: for an environment without installed packages.
    """
    found = {text.encode() for one in importlib.metadata.distributions() if (text := one.read_text("METADATA"))}
    if not found:
        raise DataError("no installed package has a description here")
    return sorted(found, key=lambda raw: hashlib.sha256(raw).digest())


TEXTS = {"manual": manual, "headers": headers, "descriptions": descriptions}


class InstalledText(PackedSettings):
    """English or C++ text of the installed Python, torch and other packages, one token a byte."""

    kind: Kind = "manual"
    """The language reference, torch's headers, or descriptions of packages."""
    bytes: Annotated[int, Field(gt=0)] = 600_000
    """How much text to take, whole documents only."""
    skip: Annotated[int, Field(ge=0)] = 0
    """Leave out the first documents up to so many bytes: for text that no other source reads."""
    scrambled: bool = False
    """Put every byte through one fixed permutation: text as regular as before, whose lessons contradict the plain
    text's."""
    cache: Path = Path(".data")
    """Where the token shards are kept; they are written once."""

    def build(self, context: SourceContext) -> PackedSource:
        """The source of one split; the shards are made on first use."""
        return self.packed(self.shards(), context)

    def shards(self) -> TokenShards:
        """The token shards, written where they are missing."""
        texts = TEXTS[self.kind]()
        parts = [hashlib.sha256(text).hexdigest() for text in texts]
        parts += [sys.version, str(self.bytes), str(self.skip), str(self.scrambled)]
        name = hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]
        target = self.cache / f"{self.kind}-{name}"
        return byte_shards(target, self._documents(texts))

    def _documents(self, texts: Texts) -> Iterator[NDArray[np.int64]]:
        table = np.arange(256, dtype=np.uint8)
        if self.scrambled:
            table = np.random.Generator(np.random.Philox(key=hash64("scrambled text"))).permutation(table)
        passed, left = 0, list(texts)
        while left and passed < self.skip:
            passed += len(left.pop(0))
        for raw in whole_documents(left, self.bytes):
            yield byte_document(table[np.frombuffer(raw, np.uint8)])
