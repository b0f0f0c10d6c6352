"""Lines of a log apart: steps as columns of numbers, everything else as JSON objects, in order.

A long run has a million step lines. One pattern reads them several times as fast as a JSON parser does; what it
does not know to the letter goes to the parser.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from itertools import chain
from typing import Any

import numpy as np
import numpy.typing as npt

COLUMNS = ("time", "step", "loss", "grad_norm", "units", "seconds")
_WRITTEN = ("time", "step", "loss", "lr", "grad_norm", "units", "seconds")  # in the order of `StepDone`
_STEP = re.compile(
    rb'\{"event":"step",'
    + b",".join(rb'"%s":%s' % (name.encode(), rb"([^,\n]+)" if name in COLUMNS else rb"[^,\n]+") for name in _WRITTEN)
    + rb"[,}][^\n]*\n"
)
_BEFORE_OTHER = re.compile(rb'\n(?!\{"event":"step",)[^\n]')

Columns = npt.NDArray[np.float64]
"""(6, steps) the numbers of `COLUMNS`."""


def parts_of(raw: bytes) -> Iterator[Columns | dict[str, Any] | None]:
    """What whole lines say.

    Args:
        raw: lines, each with its end.

    Yields:
        Steps that follow each other, another event, or None for a line that is no event.
    """
    raw = b"\n" + raw  # so that every line has an end before it
    at = 1
    for other in _BEFORE_OTHER.finditer(raw):
        begin = other.start() + 1
        if begin > at:
            yield from _steps(raw[at:begin])
        at = raw.index(b"\n", begin) + 1
        yield from _each(raw[begin:at])
    if at < len(raw):
        yield from _steps(raw[at:])


def _steps(raw: bytes) -> Iterator[Columns | dict[str, Any] | None]:
    found = _STEP.findall(raw)
    if len(found) == raw.count(b"\n") and (columns := _columns(found)) is not None:
        yield columns
        return
    yield from _each(raw)


def _each(raw: bytes) -> Iterator[Columns | dict[str, Any] | None]:
    """Line by line, as a JSON parser reads them."""
    for line in raw.split(b"\n"):
        if line.strip():
            told = _event(line)
            yield _row(told) if told is not None else None


def _columns(found: list[tuple[bytes, ...]]) -> Columns | None:
    values = list(chain.from_iterable(found))
    try:
        flat = np.fromiter(map(float, values), np.float64, len(values))
    except ValueError:
        try:  # "nan" and "inf" are strings in JSON
            flat = np.fromiter((float(value.strip(b'"')) for value in values), np.float64, len(values))
        except ValueError:
            return None
    return flat.reshape(-1, len(COLUMNS)).T


def _row(told: Mapping[str, Any]) -> Columns | dict[str, Any] | None:
    if told["event"] != "step":
        return dict(told)
    try:
        return np.array([[float(told[name])] for name in COLUMNS])
    except (KeyError, TypeError, ValueError):
        return None


def _event(line: bytes) -> dict[str, Any] | None:
    try:
        told = json.loads(line)
    except ValueError:
        return None
    return told if isinstance(told, dict) and isinstance(told.get("event"), str) else None
