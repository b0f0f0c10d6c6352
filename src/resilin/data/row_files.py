"""Whole rows of JSONL, Parquet and Arrow files, each with the place it was read from; and writing them again."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from resilin.data.columnar import table_rows
from resilin.data.errors import DataError
from resilin.data.inputs import Format, InputFile, find_inputs


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a file.

    Attributes:
        value: its columns.
        where: file, with line or row number, for messages.
    """

    value: dict[str, Any]
    where: str

    def error(self, what: str) -> DataError:
        """Something wrong with this row, as an error that stops the work."""
        return DataError(f"{self.where}: {what}")


def _json_rows(file: InputFile) -> Iterator[Row]:
    with file.path.open("rb") as stream:
        for number, raw in enumerate(stream, 1):
            where = f"{file.path}, line {number}"
            try:
                text = raw.decode("utf-8-sig" if number == 1 else "utf-8")
                if not text.strip():
                    continue
                value = json.loads(text)
            except UnicodeDecodeError as error:
                raise DataError(f"{where}: invalid UTF-8 (0x{raw[error.start]:02x}: {error.reason})") from None
            except json.JSONDecodeError as error:
                raise DataError(f"{where}: not valid JSON: {error.msg} at column {error.colno}") from None
            except RecursionError:
                raise DataError(f"{where}: not usable JSON: too deep") from None
            if not isinstance(value, dict):
                raise DataError(f"{where}: should be an object of columns, not {str(value)[:40]!r}")
            yield Row(value, where)


def read_rows(paths: Sequence[str | Path], *, format: Format | None = None, split: str = "train") -> Iterator[Row]:
    """The rows of some files, folders, patterns or saved data sets, in order.

    Args:
        paths: as for `find_inputs`.
        format: how files are read; None goes by their endings.
        split: which split of a saved data set that has several.

    Raises:
        DataError: for a file that holds no rows, broken JSON, invalid UTF-8 or a damaged table, naming file and line.
    """
    for file in find_inputs(paths, format=format, split=split).files:
        if file.bytes == 0:
            raise DataError(f"{file.path}: is empty")
        if file.format == "text":
            raise DataError(f"{file.path}: is text; rows are read from .jsonl, .parquet or .arrow files")
        if file.format == "jsonl":
            yield from _json_rows(file)
        else:
            for number, value in table_rows(file):
                yield Row(value, f"{file.path}, row {number}")


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> int:
    """Write rows as .jsonl or .parquet, whole or not at all; returns how many.

    Raises:
        DataError: for another ending, or rows whose columns do not agree on their types (Parquet).
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    count = 0
    try:
        if path.suffix == ".jsonl":
            with temporary.open("w", encoding="utf-8") as stream:
                for row in rows:
                    stream.write(json.dumps(row, ensure_ascii=False) + "\n")
                    count += 1
        elif path.suffix == ".parquet":
            count = _write_parquet(temporary, [dict(row) for row in rows])
        else:
            raise DataError(f"{path}: rows are written to files that end in .jsonl or .parquet")
        os.replace(temporary, path)  # noqa: PTH105 - atomic, also over an existing file
    finally:
        temporary.unlink(missing_ok=True)
    return count


def _write_parquet(path: Path, rows: list[dict[str, Any]]) -> int:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise DataError("writing Parquet files needs pyarrow: pip install 'resilin[datasets]'") from None
    names = list(dict.fromkeys(name for row in rows for name in row))
    try:
        pq.write_table(pa.table({name: [row.get(name) for row in rows] for name in names}), path)
    except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError) as error:
        raise DataError(f"{path}: these rows make no table ({error}): write .jsonl") from None
    return len(rows)
