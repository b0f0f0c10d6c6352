"""Token shards: a folder of raw little-endian token files under one JSON index.

    index.json               format, dtype, vocabulary size, digests, the list of shards, what was skipped
    tokenizer.json, ...      the tokenizer that made the tokens (left out when the tokens came from elsewhere)
    shard-00000.tokens       uint16 or uint32 token ids
    shard-00000.starts       uint64, where each document of the shard starts, in tokens from the shard's beginning
    shard-00000.units        uint8 per token, 1 where the token is one to learn (chat data only)

The stream of tokens is the shards in order. A document may go on from one shard into the next: a start is written
only where a document starts. Everything is opened by memory map, so a data set of any size opens at once.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from resilin.data.errors import DataError, Problem, inside
from resilin.data.tokenizer import TOKENIZER_FILE, Tokenizer

INDEX_FILE = "index.json"
FORMAT = "resilin token shards"
VERSION = 1
_DTYPES: dict[str, np.dtype[Any]] = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}
_STARTS = np.dtype("<u8")
_PARTS = ("tokens", "starts", "units")

TokenArray = NDArray[Any]


def token_dtype(vocab_size: int) -> str:
    """The smallest stored integer type that holds every id of a vocabulary."""
    return "uint16" if vocab_size <= 2**16 else "uint32"


def numpy_dtype(name: str) -> np.dtype[Any]:
    """The numpy type of a stored type's name."""
    return _DTYPES[name]


@dataclass(frozen=True, slots=True)
class Shard:
    """One shard of an index.

    Attributes:
        name: the file name without its ending.
        tokens: number of tokens.
        documents: number of document starts.
        text_bytes: bytes of UTF-8 text the tokens stand for.
        sha256: checksum of each file, by ending.
    """

    name: str
    tokens: int
    documents: int
    text_bytes: int
    sha256: dict[str, str]

    def as_json(self) -> dict[str, Any]:
        """The shard's entry in the index."""
        return {
            "name": self.name,
            "tokens": self.tokens,
            "documents": self.documents,
            "text_bytes": self.text_bytes,
            "sha256": self.sha256,
        }

    @staticmethod
    def from_json(entry: Any, where: str) -> Shard:
        """The shard of an index entry.

        Raises:
            DataError: naming the field that is missing or of another type.
        """
        if not isinstance(entry, dict):
            raise DataError(f"{where}: should be a table, not {entry!r}")
        for key, kind in (("name", str), ("tokens", int), ("documents", int), ("text_bytes", int), ("sha256", dict)):
            value = entry.get(key)
            if type(value) is not kind or (isinstance(value, int) and value < 0):
                raise DataError(f"{where}: {key} should be a {kind.__name__}, not {value!r}")
        sums = entry["sha256"]
        if not {"tokens", "starts"} <= set(sums) <= set(_PARTS):
            raise DataError(f"{where}: sha256 should have tokens and starts (and units), not {sorted(sums)}")
        return Shard(entry["name"], entry["tokens"], entry["documents"], entry["text_bytes"], sums)


def read_index(folder: Path) -> dict[str, Any]:
    """The index of a shard folder as it stands in the file, after checking that it is one."""
    file = folder / INDEX_FILE
    if not file.is_file():
        unfinished = (folder / "plan.json").is_file()
        why = "tokenising has not finished: run the same command again" if unfinished else "it is no shard folder"
        raise DataError(f"{folder}: no {INDEX_FILE}; {why}")
    try:
        index = json.loads(file.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise DataError(f"{file}: not valid JSON: {error}") from None
    if not isinstance(index, dict) or index.get("format") != FORMAT:
        raise DataError(f"{file}: not an index of token shards (its format should be {FORMAT!r})")
    if index.get("version") != VERSION:
        raise DataError(f"{file}: version {index.get('version')!r}; this Resilin reads version {VERSION}")
    if index.get("dtype") not in _DTYPES:
        raise DataError(f"{file}: dtype {index.get('dtype')!r} should be one of {', '.join(_DTYPES)}")
    vocab_size = index.get("vocab_size")
    if not isinstance(vocab_size, int) or not 1 <= vocab_size <= 2**32:
        raise DataError(f"{file}: vocab_size {vocab_size!r} should be a positive number")
    if not isinstance(index.get("shards"), list):
        raise DataError(f"{file}: shards should be a list")
    return index


class TokenShards:
    """A shard folder, opened by memory map.

    Attributes:
        folder: where it is.
        index: the index as it stands in the file.
        shards: its shards, in stream order.
        dtype: the stored integer type.
        vocab_size: every id is below it.

    Raises:
        DataError: naming the file that is missing, truncated, or not what the index says. Contents are not read
            here: `verify` reads them against their checksums.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        self.index = read_index(self.folder)
        self.dtype = _DTYPES[self.index["dtype"]]
        self.vocab_size: int = self.index["vocab_size"]
        where = str(self.folder / INDEX_FILE)
        entries = self.index["shards"]
        self.shards = [Shard.from_json(entry, f"{where}: shards[{i}]") for i, entry in enumerate(entries)]
        self.has_units = any("units" in shard.sha256 for shard in self.shards)
        self._tokens = [self._map(shard, "tokens", self.dtype, shard.tokens) for shard in self.shards]
        self._starts = [self._map(shard, "starts", _STARTS, shard.documents) for shard in self.shards]
        self._units = (
            [self._map(shard, "units", np.dtype("u1"), shard.tokens) for shard in self.shards] if self.has_units else []
        )

    def _map(self, shard: Shard, part: str, dtype: np.dtype[Any], count: int) -> TokenArray:
        file = inside(self.folder, f"{shard.name}.{part}")
        if not file.is_file():
            raise DataError(f"{file}: missing; {INDEX_FILE} lists it: restore it or tokenise again")
        size, expected = file.stat().st_size, count * dtype.itemsize
        if size != expected:
            state = "truncated" if size < expected else "too long"
            raise DataError(
                f"{file}: {state}: it has {size} bytes, {INDEX_FILE} says {expected} ({count} x {dtype.itemsize} "
                f"bytes), so it differs from byte {min(size, expected)} on: restore it or tokenise again"
            )
        if count == 0:
            return np.empty(0, dtype)
        # A plain array over the map: indexing np.memmap itself costs several times more per slice.
        return np.asarray(np.memmap(file, dtype, mode="r", shape=(count,)))

    @property
    def token_count(self) -> int:
        """Tokens of the whole stream."""
        return sum(shard.tokens for shard in self.shards)

    @property
    def document_count(self) -> int:
        """Documents of the whole stream."""
        return sum(shard.documents for shard in self.shards)

    @property
    def text_bytes(self) -> int:
        """Bytes of text the stream stands for."""
        return sum(shard.text_bytes for shard in self.shards)

    @cached_property
    def digest(self) -> str:
        """A hash of the contents: equal digests mean equal tokens, starts and units under an equal vocabulary."""
        return contents_digest(self.index["dtype"], self.vocab_size, self.shards)

    @cached_property
    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer stored beside the tokens, or None."""
        return Tokenizer.load(self.folder) if (self.folder / TOKENIZER_FILE).is_file() else None

    def tokens(self, shard: int) -> TokenArray:
        """The tokens of one shard: (tokens,) of `dtype`, read-only, on disk until touched."""
        return self._tokens[shard]

    def starts(self, shard: int) -> TokenArray:
        """Where the documents of one shard start: (documents,) uint64, in tokens from the shard's beginning."""
        return self._starts[shard]

    def units(self, shard: int) -> TokenArray:
        """Which tokens of one shard are to be learnt: (tokens,) uint8; only where `has_units`."""
        return self._units[shard]

    def verify(self) -> list[Problem]:
        """Read everything: checksums, ids below the vocabulary size, starts in order. Empty when all is well."""
        problems = []
        for number, shard in enumerate(self.shards):
            for part, expected in shard.sha256.items():
                file = self.folder / f"{shard.name}.{part}"
                if file_sha256(file) != expected:
                    what = f"its contents do not match the checksum in {INDEX_FILE}: restore it or tokenise again"
                    problems.append(Problem("checksum", str(file), what))
            file = self.folder / f"{shard.name}.tokens"
            tokens = self._tokens[number]
            if len(tokens) and int(tokens.max()) >= self.vocab_size:
                at = int(np.argmax(tokens >= self.vocab_size))
                where = f"{file}, byte {at * self.dtype.itemsize}"
                what = f"token id {int(tokens[at])} is not below the vocabulary size {self.vocab_size}"
                problems.append(Problem("token id out of range", where, what))
            starts = self._starts[number]
            ordered = bool((starts[1:] > starts[:-1]).all()) and (not len(starts) or int(starts[-1]) < shard.tokens)
            if not ordered:
                where = str(self.folder / f"{shard.name}.starts")
                problems.append(Problem("document starts", where, "starts do not increase within the shard"))
        recorded = self.index.get("digest")
        if recorded != self.digest:
            where = str(self.folder / INDEX_FILE)
            problems.append(Problem("checksum", where, f"its digest is {recorded!r}, its shards give {self.digest}"))
        return problems


def contents_digest(dtype: str, vocab_size: int, shards: Sequence[Shard]) -> str:
    """The digest of an index: over the checksums of all parts of all shards, in order."""
    parts = [dtype, str(vocab_size)]
    parts += [f"{part}:{shard.sha256[part]}" for shard in shards for part in sorted(shard.sha256)]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def file_sha256(file: Path) -> str:
    """SHA-256 of a file, read in pieces."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
