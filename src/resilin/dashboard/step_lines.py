"""Lines of a log apart: steps as columns of numbers, everything else as JSON objects, in order.

A long run has a million step lines. One pattern reads them several times as fast as a JSON parser does; what it
does not know to the letter goes to the parser.
"""

from __future__ import annotations

import json
import re
from array import array
from collections.abc import Iterator, Mapping
from typing import Any

COLUMNS = ("time", "step", "loss", "lr", "grad_norm", "units", "seconds")
_NUMBER = rb'"?(-?(?:[\d.]+(?:[eE][+-]?\d+)?|nan|inf))"?'
_STEP = re.compile(
    rb'\{"event":"step",'
    + b",".join(b'"%s":%s' % (name.encode(), _NUMBER) for name in COLUMNS)
    + rb'(?:,"mfu":[^\n]*)?\}\n'
)
_OTHER = re.compile(rb'^(?!\{"event":"step",)[^\n]*\n', re.MULTILINE)

Columns = tuple["array[float]", ...]
"""One column of numbers for each name in `COLUMNS`."""


def parts_of(raw: bytes) -> Iterator[Columns | dict[str, Any] | None]:
    """What whole lines say.

    Args:
        raw: lines, each with its end.

    Yields:
        Steps that follow each other, another event, or None for a line that is no event.
    """
    at = 0
    for other in _OTHER.finditer(raw):
        if other.start() > at:
            yield from _steps(raw[at : other.start()])
        at = other.end()
        if line := other.group().strip():
            yield _event(line)
    if at < len(raw):
        yield from _steps(raw[at:])


def _steps(raw: bytes) -> Iterator[Columns | dict[str, Any] | None]:
    found = _STEP.findall(raw)
    if len(found) == raw.count(b"\n"):
        yield tuple(array("d", map(float, column)) for column in zip(*found, strict=True))
        return
    for line in raw.splitlines():
        told = _event(line)
        yield _row(told) if told is not None else None


def _row(told: Mapping[str, Any]) -> Columns | None:
    try:
        return tuple(array("d", [float(told[name])]) for name in COLUMNS)
    except (KeyError, TypeError, ValueError):
        return None


def _event(line: bytes) -> dict[str, Any] | None:
    try:
        told = json.loads(line)
    except ValueError:
        return None
    return told if isinstance(told, dict) and isinstance(told.get("event"), str) else None
