"""Files that are whole or absent, whatever happens while they are written.

The order is what makes it so: the bytes go to another name in the same folder, reach the disk (fsync), take the
final name in one indivisible step (rename), and the folder's own entry reaches the disk as well.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path


def sync_folder(folder: Path) -> None:
    """Bring the folder's list of names to disk, so that a rename survives a power cut."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def rename(source: Path, target: Path) -> None:
    """Give `source` the name `target` in the same folder, on disk too when this returns."""
    os.rename(source, target)  # noqa: PTH104  # Path.rename would do; tests inject failures into one place
    sync_folder(target.parent)


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[int]:
    """A file descriptor for a file that must not exist yet; synced to disk when the block ends without an error."""
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        yield handle
        os.fsync(handle)
    finally:
        os.close(handle)


def write_all(handle: int, data: bytes | memoryview) -> None:
    """Write every byte; a single `os.write` may stop early."""
    view = memoryview(data)
    while len(view):
        view = view[os.write(handle, view) :]


def write_file(path: Path, data: bytes | str) -> None:
    """Replace or create `path` so that readers see the old content or the new one, never a mixture.

    Args:
        path: the file; its folder must exist.
        data: its whole content; text is written as UTF-8.

    Raises:
        OSError: nothing has changed and nothing is left behind.
    """
    raw = data.encode() if isinstance(data, str) else data
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.unlink(missing_ok=True)  # of a killed process that had the same id
        with new_file(temporary) as handle:
            write_all(handle, raw)
        rename(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
