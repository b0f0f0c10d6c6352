"""The run's own record: `events.jsonl`, one JSON object a line for everything that happened."""

from __future__ import annotations

import contextlib
import json
import os
import warnings
from pathlib import Path
from typing import Any

from resilin.run.events import Event, RunEnded, Saved, to_json


def torn_tail(raw: bytes) -> int:
    """How many bytes at the end of a log are a line that was never finished: 0 unless the writer was killed."""
    tail = raw[raw.rfind(b"\n") + 1 :]
    if not tail:
        return 0
    with contextlib.suppress(ValueError):
        if isinstance(json.loads(tail), dict):
            return 0  # whole, only its line end is missing
    return len(tail)


class JsonlLog:
    """A listener that appends every event to a file, at once, so that it can be followed with `tail -f`.

    A resumed run appends to the same file; a line that a kill left unfinished is removed first. When the disk is
    full the run goes on without a record and says so once: the next checkpoint will report the disk, and stop.

    Args:
        path: the file; its folder is made if needed.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
        self._open = True
        self._complained = False
        self._mend()

    def _mend(self) -> None:
        size = os.fstat(self._handle).st_size
        # The last line is found from the end: a log of a long run need not be read to be continued.
        window = 1 << 16
        while True:
            raw = os.pread(self._handle, window, max(0, size - window))
            if b"\n" in raw or len(raw) == size:
                break
            window *= 2
        torn = torn_tail(raw)
        if torn:
            os.ftruncate(self._handle, size - torn)
        elif raw and not raw.endswith(b"\n"):
            os.write(self._handle, b"\n")

    def __call__(self, event: Event) -> None:
        """Append one line; checkpoints and the end also bring the file to disk."""
        line = json.dumps(to_json(event), allow_nan=False, ensure_ascii=False, separators=(",", ":")) + "\n"
        raw = line.encode(errors="backslashreplace")
        before = os.fstat(self._handle).st_size
        try:
            written = os.write(self._handle, raw)
            if written < len(raw):
                raise OSError(f"only {written} of {len(raw)} bytes were taken")
            if isinstance(event, Saved | RunEnded):
                os.fsync(self._handle)
        except OSError as error:
            with contextlib.suppress(OSError):
                os.ftruncate(self._handle, before)  # half a line would spoil the next one
            if not self._complained:
                self._complained = True
                warnings.warn(f"{self.path}: events are not being recorded ({error})", stacklevel=2)

    def close(self) -> None:
        """Close the file."""
        if self._open:
            os.close(self._handle)
            self._open = False

    def __enter__(self) -> JsonlLog:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()
