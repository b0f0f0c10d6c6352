"""Numbers as people write them: `20M` parameters, `20ms`."""

from __future__ import annotations

import re

from resilin.nested.budgets import BudgetError

_COUNTS = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9, "b": 1e9, "t": 1e12}
_SECONDS = {"s": 1.0, "ms": 1e-3, "us": 1e-6}


def _parsed(text: str, units: dict[str, float], what: str) -> float:
    match = re.fullmatch(r"\s*(\d+\.?\d*|\.\d+)\s*([a-zA-Z]*)\s*", text)
    if match is None or match[2].lower() not in units:
        known = ", ".join(f"20{unit}" for unit in units)
        raise BudgetError(f"{text!r} is no {what}: write it like {known}")
    return float(match[1]) * units[match[2].lower()]


def count_of(text: str) -> float:
    """A number of parameters or operations: `20M`, `1.5B`, `350000`.

    Raises:
        BudgetError: it is none.
    """
    return _parsed(text, _COUNTS, "number")


def seconds_of(text: str) -> float:
    """A time: `20ms`, `0.5s`.

    Raises:
        BudgetError: it is none.
    """
    return _parsed(text, _SECONDS, "time")
