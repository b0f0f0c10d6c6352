"""From pieces of files to documents, with every flaw named by file and line or byte."""

from __future__ import annotations

import codecs
import json
import mmap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from resilin.data.columnar import column
from resilin.data.errors import DataError, Problem
from resilin.data.inputs import InputFile, Piece


@dataclass(frozen=True, slots=True)
class Document:
    """One document, or part of a long one.

    Attributes:
        value: its text, or whatever else its key holds.
        file: where it was read.
        at: the byte it starts at, or the row it is.
        begins: False for a later part of a document.
        ends: False for a part that is not the last.
    """

    value: Any
    file: InputFile
    at: int
    begins: bool = True
    ends: bool = True

    @property
    def where(self) -> str:
        """File and line or row, for messages."""
        columnar = self.file.format in ("parquet", "arrow")
        return f"{self.file.path}, row {self.at}" if columnar else _place(self.file, self.at)


@dataclass(frozen=True, slots=True)
class Blank:
    """A document or line with nothing in it: counted, never an error."""


Found = Document | Problem | Blank


def _is_space(raw: bytes, at_end: bool) -> bool:
    """Whether the last (or first) character of some bytes is whitespace; True where that cannot be told."""
    for width in range(1, min(4, len(raw)) + 1):
        try:
            return (raw[-width:] if at_end else raw[:width]).decode().isspace()
        except UnicodeDecodeError:
            continue
    return True


def _cut(file: InputFile, at: int, separator: bytes | None) -> int:
    """The first place from byte `at` on where the file may be cut.

    Between documents after their separator; inside one text after a line end that stands alone between two words:
    there a tokenizer whose words are cut at whitespace gives the same ids for the parts as for the whole.
    """
    if at <= 0 or at >= file.bytes:
        return max(0, min(at, file.bytes))
    mark = separator or b"\n"
    with file.path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        found = mapped.find(mark, max(0, at - len(mark)))
        while found >= 0:
            after = found + len(mark)
            between_words = separator is not None or not (
                _is_space(mapped[max(0, found - 4) : found], at_end=True)
                or _is_space(mapped[after : after + 4], at_end=False)
            )
            if after >= at and between_words:
                return after
            found = mapped.find(mark, found + 1)
    return file.bytes


def _read(file: InputFile, start: int, stop: int) -> tuple[bytes, int]:
    """The bytes [start, stop) and the byte they begin at: behind a byte order mark, which is no text."""
    with file.path.open("rb") as stream:
        stream.seek(start)
        raw = stream.read(stop - start)
    if len(raw) != stop - start:
        raise DataError(f"{file.path}, byte {start + len(raw)}: the file has become shorter while it was read")
    if start == 0 and raw.startswith(codecs.BOM_UTF8):
        return raw[len(codecs.BOM_UTF8) :], len(codecs.BOM_UTF8)
    return raw, start


def _line_number(path: Path, byte: int) -> int:
    """Line of a byte, from 1; reads the file up to there, so it is asked only for messages."""
    count = 1
    with path.open("rb") as stream:
        while byte > 0 and (block := stream.read(min(byte, 1 << 20))):
            count += block.count(b"\n")
            byte -= len(block)
    return count


def _place(file: InputFile, byte: int) -> str:
    return f"{file.path}, line {_line_number(file.path, byte)}, byte {byte}"


def _decode(file: InputFile, raw: bytes, offset: int) -> str | Problem:
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        what = f"invalid UTF-8 (0x{raw[error.start]:02x}: {error.reason})"
        return Problem("invalid UTF-8", _place(file, offset + error.start), what)


def _whole_text(file: InputFile, piece: Piece) -> Iterator[Found]:
    """A file that is one document, or part of it; with flaws, its good lines."""
    start, stop = _cut(file, piece.start, None), _cut(file, piece.stop, None)
    raw, start = _read(file, start, stop)
    begins, ends = piece.start == 0, piece.stop == file.bytes
    text = _decode(file, raw, start)
    if isinstance(text, Problem):
        good, offset = [], start
        for line in raw.splitlines(keepends=True):
            read = _decode(file, line, offset)
            offset += len(line)
            if isinstance(read, Problem):
                yield read
            else:
                good.append(read)
        text = "".join(good)
    if text or not (begins and ends):
        yield Document(text, file, start, begins, ends)
    else:
        yield Blank()


def _separated(file: InputFile, piece: Piece, separator: bytes) -> Iterator[Found]:
    """The documents between separators."""
    start, stop = _cut(file, piece.start, separator), _cut(file, piece.stop, separator)
    if start == stop:
        return
    whole, offset = _read(file, start, stop)
    raws = whole.split(separator)
    if not raws[-1]:
        raws.pop()
    for raw in raws:
        text = _decode(file, raw, offset)
        if isinstance(text, Problem):
            yield text
        elif text.strip():
            yield Document(text, file, offset)
        else:
            yield Blank()
        offset += len(raw) + len(separator)


def _json_lines(file: InputFile, piece: Piece, key: str) -> Iterator[Found]:
    start, stop = _cut(file, piece.start, b"\n"), _cut(file, piece.stop, b"\n")
    whole, offset = _read(file, start, stop)
    raws = whole.split(b"\n") if whole else []
    if raws and not raws[-1]:
        raws.pop()
    for raw in raws:
        if not raw.strip():
            yield Blank()
        else:
            try:
                yield _value(json.loads(raw.decode()), key, file, offset)
            except UnicodeDecodeError:
                problem = _decode(file, raw, offset)
                assert isinstance(problem, Problem)
                yield problem
            except (json.JSONDecodeError, RecursionError) as error:
                reason = (
                    f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else "too deep"
                )
                yield Problem("broken JSON", _place(file, offset), f"not valid JSON: {reason}")
        offset += len(raw) + 1


def _value(line: Any, key: str, file: InputFile, offset: int) -> Found:
    if not isinstance(line, dict):
        what = f"should be an object with the key {key!r}, not {_shown(line)}"
        return Problem("no object", _place(file, offset), what)
    if key not in line:
        keys = ", ".join(sorted(map(str, line))) or "none"
        return Problem("missing key", _place(file, offset), f"no key {key!r}; its keys are: {keys}")
    return Document(line[key], file, offset)


def _shown(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 40 else f"{text[:37]}..."


def read_piece(file: InputFile, piece: Piece, *, key: str, separator: str | None) -> Iterator[Found]:
    """What a piece of a file holds, in order.

    Args:
        file: the file.
        piece: which part.
        key: for JSONL, Parquet and Arrow: where the document stands.
        separator: for text: what stands between documents; None takes each file as one.

    Yields:
        Documents; problems, which the caller raises or counts; blanks.
    """
    if file.bytes == 0:
        yield Problem("empty file", str(file.path), "is empty")
    elif file.format == "text":
        yield from _whole_text(file, piece) if separator is None else _separated(file, piece, separator.encode())
    elif file.format == "jsonl":
        yield from _json_lines(file, piece, key)
    else:
        for row, value in column(file, key, piece.start, piece.stop):
            yield Document(value, file, row)


def as_text(document: Document, key: str) -> tuple[str, int] | Problem | Blank:
    """The text of a document and its length in bytes, or what is wrong with it."""
    text = document.value
    if not isinstance(text, str):
        return Problem("wrong type", document.where, f"{key!r} should hold text, not {_shown(text)}")
    if not text and document.begins and document.ends:
        return Blank()
    if text.isascii():
        return text, len(text)
    try:
        return text, len(text.encode())
    except UnicodeEncodeError as error:
        return Problem("invalid UTF-8", document.where, f"{key!r} holds half a surrogate pair at {error.start}")
