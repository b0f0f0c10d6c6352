"""Which files make up a data set, and how the work on them is cut into pieces."""

from __future__ import annotations

import glob
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Literal

from resilin.data.errors import DataError, inside

Format = Literal["text", "jsonl", "parquet", "arrow"]
_ENDINGS: dict[str, Format] = {
    ".txt": "text",
    ".text": "text",
    ".md": "text",
    ".rst": "text",
    ".py": "text",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".parquet": "parquet",
    ".arrow": "arrow",
}
_SAMPLED = 16 << 20
_BLOCK = 1 << 20


@dataclass(frozen=True, slots=True)
class InputFile:
    """One file of a data set.

    Attributes:
        path: where it is.
        name: how the index calls it: relative to the folder that was given.
        format: how it is read.
        bytes: its size.
    """

    path: Path
    name: str
    format: Format
    bytes: int

    def fingerprint(self) -> str:
        """A hash by which a changed file is told: of all bytes, or above 16 MiB of 16 blocks, size and time."""
        try:
            return _fingerprint(self, self.path.stat().st_mtime_ns)
        except OSError as error:
            raise DataError(f"{self.path}: cannot be read: {error.strerror}") from None


@cache
def _fingerprint(file: InputFile, modified: int) -> str:
    digest = hashlib.blake2b(f"{file.name}:{file.format}:{file.bytes}:".encode(), digest_size=16)
    with file.path.open("rb") as stream:
        if file.bytes <= _SAMPLED:
            digest.update(stream.read())
        else:
            digest.update(str(modified).encode())
            for block in range(16):
                stream.seek(block * (file.bytes - _BLOCK) // 15)
                digest.update(stream.read(_BLOCK))
    return digest.hexdigest()


@dataclass(frozen=True, slots=True)
class Inputs:
    """The files of a data set, in order, and what was left out of its folders.

    Attributes:
        files: what will be read.
        left_out: files whose ending is of no known format, found in folders.
    """

    files: tuple[InputFile, ...]
    left_out: tuple[str, ...] = ()

    @property
    def bytes(self) -> int:
        """Size of all files."""
        return sum(file.bytes for file in self.files)


_PACKED = (".gz", ".bz2", ".xz", ".zst", ".zip", ".tar", ".7z", ".whl")


def _file(path: Path, name: str, wanted: Format | None) -> InputFile:
    ending = path.suffix.lower()
    if wanted is None and ending in _PACKED:
        raise DataError(f"{path}: is compressed; unpack it first (archives of texts with `resilin data unpack`)")
    if wanted is None and ending == ".json":
        raise DataError(f"{path}: if it holds one JSON object a line, set format=jsonl; a JSON array must become that")
    return InputFile(path, name, wanted or _ENDINGS.get(ending, "text"), path.stat().st_size)


def _saved_data_set(folder: Path, split: str) -> list[Path] | None:
    """The Arrow files of a folder that `datasets` saved, or None where it is none."""
    splits_file, state_file = folder / "dataset_dict.json", folder / "state.json"
    try:
        if splits_file.is_file():
            splits = json.loads(splits_file.read_text(encoding="utf-8"))["splits"]
            if split not in splits:
                raise DataError(f"{folder}: no split {split!r}; this data set has: {', '.join(splits)}")
            return _saved_data_set(inside(folder, split), split)
        if state_file.is_file() and (folder / "dataset_info.json").is_file():
            entries = json.loads(state_file.read_text(encoding="utf-8"))["_data_files"]
            return [inside(folder, entry["filename"]) for entry in entries]
    except (KeyError, TypeError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{folder}: looks like a saved data set, but its JSON files are broken: {error!r}") from None
    return None


def _folder(folder: Path, wanted: Format | None, split: str) -> tuple[list[InputFile], list[str]]:
    saved = _saved_data_set(folder, split)
    if saved is not None:
        for path in saved:
            if not path.is_file():
                raise DataError(f"{path}: missing; the data set's state.json lists it")
        return [_file(path, path.relative_to(folder).as_posix(), "arrow") for path in saved], []
    files, left_out = [], []
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if not path.is_file() or any(part.startswith(".") for part in Path(name).parts):
            continue
        known = _ENDINGS.get(path.suffix.lower())
        if known is None or (wanted is not None and known != wanted):
            left_out.append(name)
        else:
            files.append(_file(path, name, known))
    return files, left_out


def find_inputs(inputs: Sequence[str | Path], *, format: Format | None = None, split: str = "train") -> Inputs:
    """The files of some paths: files, folders, glob patterns, or data sets saved by `datasets`.

    Args:
        inputs: in the order in which they are read; a folder's files are read in the order of their names.
        format: how to read them; None goes by each file's ending (a file named directly may have any ending and is
            then text).
        split: which split of a saved data set that has several.

    Raises:
        DataError: naming the input that leads to no file, or the same file twice.
    """
    files: list[InputFile] = []
    left_out: list[str] = []
    for given in inputs:
        path = Path(given).expanduser()
        if path.is_dir():
            found, other = _folder(path, format, split)
            if not found:
                endings = ", ".join(_ENDINGS)
                raise DataError(f"{path}: no file in this folder ends in {endings} ({len(other)} other files)")
            files += found
            left_out += other
        elif path.is_file():
            files.append(_file(path, path.name, format))
        else:
            matches = sorted(glob.glob(str(path), recursive=True))  # noqa: PTH207 - absolute patterns too
            matched = [Path(match) for match in matches if Path(match).is_file()]
            if not matched:
                raise DataError(f"{given}: no such file or folder, and no file matches it as a pattern")
            files += [_file(match, match.name, format) for match in matched]
    seen: set[Path] = set()
    for file in files:
        real = file.path.resolve()
        if real in seen:
            raise DataError(f"{file.path}: is given twice; its text would be seen twice as often")
        seen.add(real)
    return Inputs(tuple(files), tuple(left_out))


@dataclass(frozen=True, slots=True)
class Piece:
    """Part of a file.

    Attributes:
        file: its number in the inputs.
        start: first byte, row group or record batch; where text or lines are cut, the next fitting cut after it.
        stop: last + 1.
        bytes: roughly how much there is to read.
    """

    file: int
    start: int
    stop: int
    bytes: int


Chunk = tuple[Piece, ...]
"""What one worker tokenises at a time and writes as one shard."""


def chunk_bytes(total: int) -> int:
    """How much text makes a shard: a function of the inputs alone, so that any number of workers cuts alike."""
    return min(max(total // 256, 1 << 20), 128 << 20)


def plan_chunks(inputs: Inputs, *, can_cut: bool, target: int | None = None) -> list[Chunk]:
    """Cut the inputs into chunks of about equal size.

    Args:
        inputs: the files.
        can_cut: whether a long text may be tokenised in parts (see `resilin.data.encode`).
        target: bytes of a chunk; None chooses by the size of the inputs.
    """
    size = target or chunk_bytes(inputs.bytes)
    chunks: list[Chunk] = []
    current: list[Piece] = []
    filled = 0
    for number, file in enumerate(inputs.files):
        for piece in _pieces(number, file, size, can_cut):
            if current and filled + piece.bytes > size:
                chunks.append(tuple(current))
                current, filled = [], 0
            current.append(piece)
            filled += piece.bytes
    if current:
        chunks.append(tuple(current))
    return chunks


def _pieces(number: int, file: InputFile, size: int, can_cut: bool) -> list[Piece]:
    if file.format in ("parquet", "arrow"):
        from resilin.data.columnar import parts

        bounds, start, filled, pieces = parts(file), 0, 0, []
        for index, weight in enumerate(bounds):
            filled += weight
            if filled >= size or index == len(bounds) - 1:
                pieces.append(Piece(number, start, index + 1, filled))
                start, filled = index + 1, 0
        return pieces
    if file.format == "text" and not can_cut:
        return [Piece(number, 0, file.bytes, file.bytes)]
    edges = [*range(0, max(1, file.bytes), size), file.bytes]
    if len(edges) > 2 and edges[-1] - edges[-2] < size // 8:  # no tiny last piece
        del edges[-2]
    return [Piece(number, a, b, b - a) for a, b in pairwise(edges)]
