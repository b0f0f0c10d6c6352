"""Answers on disk, one JSON line each, appended before anybody uses them.

A killed run loses at most the line it was writing: that line is ignored, and its request is asked again. Several
processes may append to one file.
"""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path
from typing import Any

from resilin.teacher.request import Sample, TeacherError


class ReplyCache:
    """Answers by key.

    Args:
        path: a .jsonl file; made with the first answer.

    Attributes:
        broken: lines that were no answer.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.broken = 0
        self._kept: dict[str, Sample] = {}
        self._lock = threading.Lock()
        self._whole = True  # the file ends with a line end
        if path.is_dir():
            raise TeacherError(f"{path}: is a folder; the cache is a file, such as {path / 'replies.jsonl'}")
        if path.is_file():
            self._read()

    def _read(self) -> None:
        raw = self.path.read_bytes()
        self._whole = not raw or raw.endswith(b"\n")
        for line in raw.split(b"\n"):
            if not line.strip():
                continue
            try:
                value = json.loads(line)
                key = value["key"]
                if not isinstance(key, str):
                    raise TypeError("key should be a text")
                self._kept.setdefault(key, Sample.from_json(value))
            except (ValueError, KeyError, TypeError):
                self.broken += 1

    def __len__(self) -> int:
        return len(self._kept)

    def __contains__(self, key: str) -> bool:
        return key in self._kept

    def get(self, key: str) -> Sample | None:
        """The answer of that key, or None."""
        return self._kept.get(key)

    def put(self, key: str, sample: Sample, about: dict[str, Any] | None = None) -> Sample:
        """Keep an answer; on disk when this returns. Returns the one that holds: the first that came."""
        with self._lock:
            if key in self._kept:
                return self._kept[key]
            line = json.dumps({"key": key, **sample.as_json(), **(about or {})}, ensure_ascii=True)
            self.path.parent.mkdir(parents=True, exist_ok=True)
            raw = (("" if self._whole else "\n") + line + "\n").encode()
            handle = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
            try:
                written = os.write(handle, raw)
                while written < len(raw):
                    written += os.write(handle, raw[written:])
                os.fsync(handle)
            finally:
                os.close(handle)
            self._whole = True
            self._kept[key] = sample
            return sample
