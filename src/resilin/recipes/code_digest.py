"""Which code made a run: a checkout's code changes while its version stays."""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path

import resilin

_NO_NUMBERS = ("bench", "cli", "planner", "recipes")
"""Packages whose code no run's numbers depend on."""


@cache
def code_digest() -> str:
    """A hash of the package's source as it is on disk, 12 hexadecimal digits."""
    folder = Path(resilin.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        inside = path.relative_to(folder)
        if inside.parts[0] not in _NO_NUMBERS:
            digest.update(f"{inside.as_posix()}\n".encode() + path.read_bytes())
    return digest.hexdigest()[:12]
