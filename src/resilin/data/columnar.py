"""Reading Parquet and Arrow files (the latter is what `datasets` saves)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from resilin.data.errors import DataError

if TYPE_CHECKING:
    from resilin.data.inputs import InputFile


def _pyarrow() -> Any:
    try:
        import pyarrow
        import pyarrow.ipc
        import pyarrow.parquet
    except ImportError:
        raise DataError("reading Parquet and Arrow files needs pyarrow: pip install 'resilin[datasets]'") from None
    return pyarrow


def _arrow_batches(file: InputFile) -> Any:
    pa = _pyarrow()
    source = pa.memory_map(str(file.path))
    try:  # `datasets` writes the stream format; other tools the file format
        return pa.ipc.open_stream(source)
    except pa.ArrowInvalid:
        reader = pa.ipc.open_file(pa.memory_map(str(file.path)))
        return (reader.get_batch(i) for i in range(reader.num_record_batches))


def parts(file: InputFile) -> list[int]:
    """Bytes of each row group or record batch of a file.

    Raises:
        DataError: naming a file that cannot be read, or that pyarrow is missing.
    """
    pa = _pyarrow()
    try:
        if file.format == "parquet":
            with pa.parquet.ParquetFile(file.path) as parquet:
                meta = parquet.metadata
                return [meta.row_group(i).total_byte_size for i in range(meta.num_row_groups)]
        return [max(1, batch.nbytes) for batch in _arrow_batches(file)]
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"{file.path}: not a readable {file.format} file: {error}") from None


def column(file: InputFile, key: str, start: int, stop: int) -> Iterator[tuple[int, Any]]:
    """(row number, value) of one column, for some row groups or record batches.

    Raises:
        DataError: naming a missing column and the columns there are, or a damaged file.
    """
    pa = _pyarrow()
    row = 0
    try:
        if file.format == "parquet":
            with pa.parquet.ParquetFile(file.path) as parquet:
                _check(file, key, parquet.schema_arrow.names)
                row = sum(parquet.metadata.row_group(i).num_rows for i in range(start))
                for batch in parquet.iter_batches(row_groups=list(range(start, stop)), columns=[key]):
                    for value in batch.column(0).to_pylist():
                        yield row, value
                        row += 1
            return
        for number, batch in enumerate(_arrow_batches(file)):
            if number >= stop:
                return
            if number < start:
                row += batch.num_rows
                continue
            _check(file, key, batch.schema.names)
            for value in batch.column(batch.schema.names.index(key)).to_pylist():
                yield row, value
                row += 1
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"{file.path}, after row {row}: not a readable {file.format} file: {error}") from None


def table_rows(file: InputFile) -> Iterator[tuple[int, dict[str, Any]]]:
    """(row number, columns) of a whole file.

    Raises:
        DataError: naming a damaged file.
    """
    pa = _pyarrow()
    row = 0
    try:
        if file.format == "parquet":
            with pa.parquet.ParquetFile(file.path) as parquet:
                for batch in parquet.iter_batches():
                    for value in batch.to_pylist():
                        yield row, value
                        row += 1
            return
        for batch in _arrow_batches(file):
            for value in batch.to_pylist():
                yield row, value
                row += 1
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"{file.path}, after row {row}: not a readable {file.format} file: {error}") from None


def _check(file: InputFile, key: str, names: list[str]) -> None:
    if key not in names:
        raise DataError(f"{file.path}: no column {key!r}; its columns are: {', '.join(names)}")
