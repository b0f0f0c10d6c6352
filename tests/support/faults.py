"""A disk that fails, or kills the process, at the n-th call that changes it."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import Any

import pytest

CALLS = ("open", "write", "fsync", "rename", "mkdir", "unlink", "rmdir")


class Fault:
    """Counts the calls that change a disk, of all threads, and does something at the n-th."""

    def __init__(self, patch: pytest.MonkeyPatch, at: int | None, act: Callable[[], None]) -> None:
        self.count = 0
        self.log: list[str] = []
        self._lock = threading.Lock()
        for name in CALLS:
            patch.setattr(os, name, self._wrapped(name, getattr(os, name), at, act))

    def _wrapped(self, name: str, real: Any, at: int | None, act: Callable[[], None]) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            with self._lock:
                number, self.count = self.count, self.count + 1
                self.log.append(name)
            if number == at:
                act()
            return real(*args, **kwargs)

        return call


def fail(number: int) -> Callable[[], None]:
    """An act: the call fails with this errno."""

    def act() -> None:
        raise OSError(number, os.strerror(number))

    return act
