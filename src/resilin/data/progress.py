"""Progress of tokenising: a bar on a terminal, a line now and then in a log."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_LINE_EVERY = 30.0  # seconds


def _lines(title: str) -> Callable[[int, int], None]:
    began = last = time.monotonic()
    before: int | None = None

    def tell(done: int, total: int) -> None:
        nonlocal last, before
        now = time.monotonic()
        before = done if before is None else before
        if now - last >= _LINE_EVERY:
            last = now
            rate = (done - before) / 1e6 / (now - began)
            sys.stderr.write(f"{title}: {done / 1e6:,.0f} of {total / 1e6:,.0f} MB, {rate:.1f} MB/s\n")

    return tell


@contextmanager
def tokenize_progress(title: str) -> Iterator[Callable[[int, int], None]]:
    """A bar with MB done, MB/s and the time left; gives the function to call with (bytes done, bytes in all)."""
    if not sys.stderr.isatty():
        yield _lines(title)
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    columns = (TextColumn(title), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(title, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
