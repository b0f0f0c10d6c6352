"""A mix of data sets by amounts, as lists of names and numbers describe it.

An amount with a decimal point is a fraction of the data set ("1.0" all of it, "3.0" three copies, "0.5" half); one
without is a number of rows ("1" is one row). The two are easily confused, and both are kept as written.

Counts truncate (`int(fraction * rows)`). More rows than there are: the data set as often as it fits as a whole, then a
choice without replacement for the rest; fewer: such a choice only. The choice is numpy's `RandomState(seed)`, as in
open-instruct's mixer, whose rows these are, in its order.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from resilin.data.errors import DataError
from resilin.data.inputs import Format, find_inputs
from resilin.data.row_files import Row, read_rows, write_rows

SOURCE = "source"
"""The column that says which entry a row came from."""


@dataclass(frozen=True, slots=True)
class MixEntry:
    """One data set of a mix.

    Attributes:
        name: its path, folder or pattern.
        amount: as written.
    """

    name: str
    amount: str


def parse_mix(alternating: Sequence[str]) -> list[MixEntry]:
    """Entries from the list [name, amount, name, amount, ...].

    Raises:
        DataError: for a list of odd length, an amount that is no number, or one below zero.
    """
    if not alternating or len(alternating) % 2:
        raise DataError(
            f"a mix is a list of names and amounts in turn; this one has {len(alternating)} items: "
            f"{', '.join(alternating) or 'none'}"
        )
    entries = [MixEntry(name, amount) for name, amount in zip(alternating[::2], alternating[1::2], strict=True)]
    for entry in entries:
        amount_of(entry.amount, 1)
    return entries


def amount_of(amount: str, rows: int) -> int:
    """How many rows of a data set of `rows` an amount asks for.

    Raises:
        DataError: for an amount that is neither a fraction ("0.5") nor a number of rows ("2000").
    """
    try:
        asked = float(amount) if "." in amount else int(amount)
    except ValueError:
        asked = math.nan
    if not (math.isfinite(asked) and asked >= 0):
        raise DataError(
            f'the amount {amount!r} is no fraction with a point ("0.5", "3.0") and no whole number of rows ("2000")'
        )
    return int(asked * rows) if isinstance(asked, float) else asked


def chosen_rows(rows: int, wanted: int, seed: int) -> list[int]:
    """Which rows of a data set a mix takes, in order: whole repeats, then a seeded choice without replacement."""
    repeats, rest = divmod(wanted, rows) if rows else (0, 0)
    chosen = list(range(rows)) * repeats
    if rest:
        chosen += np.random.RandomState(seed).choice(rows, size=rest, replace=False).tolist()
    return chosen


def mix(
    entries: Sequence[tuple[str, str]],
    seed: int = 42,
    *,
    read: Callable[[str], Sequence[Row]] | None = None,
    format: Format | None = None,
    split: str = "train",
) -> list[Row]:
    """The rows of a mix, one entry after another, each with the column `source`.

    Args:
        entries: (name, amount) pairs.
        seed: of the choice of rows.
        read: gives the rows of a name; None reads files.
        format: how files are read; None goes by their endings.
        split: which split of a saved data set.

    Raises:
        DataError: for an amount that is none, a data set without rows of which some are asked for, or a name given
            twice.
    """
    names = [name for name, _ in entries]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise DataError(f"{twice}: is given twice in the mix: give it one amount, such as the sum of both")
    mixed: list[Row] = []
    for name, amount in entries:
        rows = list(read(name) if read is not None else read_rows([name], format=format, split=split))
        wanted = amount_of(amount, len(rows))
        if wanted and not rows:
            raise DataError(f"{name}: has no rows; the mix asks for {wanted}")
        label = Path(name).name if read is None else name
        for number in chosen_rows(len(rows), wanted, seed):
            row = rows[number]
            value: dict[str, Any] = {**row.value, SOURCE: row.value.get(SOURCE) or label}
            mixed.append(Row(value, row.where))
    if not mixed:
        raise DataError(f'the mix of {", ".join(names)} has no rows: raise an amount ("1" is one row, "1.0" all)')
    return mixed


def write_mix(
    entries: Sequence[MixEntry], seed: int, cache: Path, *, format: Format | None = None, split: str = "train"
) -> Path:
    """The file in the cache that holds a mix, written where it is not there yet.

    Its name is a hash of the files' contents, the amounts and the seed.
    """
    parts = [f"mix {seed} {split}"]
    for entry in entries:
        files = find_inputs([entry.name], format=format, split=split).files
        parts += [f"{Path(entry.name).name} {entry.amount}", *(file.fingerprint() for file in files)]
    path = cache / f"mix-{hashlib.sha256(chr(10).join(parts).encode()).hexdigest()[:16]}.jsonl"
    if not path.is_file():
        rows = mix([(entry.name, entry.amount) for entry in entries], seed, format=format, split=split)
        write_rows(path, (row.value for row in rows))
    return path
