"""Layouts and plans as text: who holds what, and what would move."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from resilin.layout.census import count
from resilin.layout.holdings import Holdings
from resilin.layout.layout import Layout
from resilin.layout.moves import Plan
from resilin.layout.place import Place

_ALONE, _SHARED = "0123456789", "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
_NOBODY, _ANYBODY = ".", "#"


def in_words(nbytes: float) -> str:
    """Bytes for people: "1.5 GiB"."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if nbytes < 1024 or unit == "TiB":
            return f"{nbytes:.0f} B" if unit == "B" else f"{nbytes:.3g} {unit}"
        nbytes /= 1024
    raise AssertionError


def alike(layout: Layout) -> list[tuple[list[str], Holdings]]:
    """Tensors whose holdings are one object, together: the many equal layers of a model."""
    groups: dict[int, tuple[list[str], Holdings]] = {}
    for name, held in layout.tensors.items():
        groups.setdefault(id(held), ([], held))[0].append(name)
    return list(groups.values())


def places_table(layout: Layout, most: int = 16) -> str:
    """What each place holds: regions, bytes, and its share of all tensors' bytes."""
    held = layout.bytes_at()
    regions = np.zeros(len(layout.places), dtype=np.int64)
    for holdings in layout.tensors.values():
        regions += np.bincount(holdings.places, minlength=len(layout.places))
    total = max(layout.bytes, 1)
    rows = [
        (str(place), f"{number:,}", in_words(size), f"{size / total:.2%}")
        for (place, size), number in zip(held.items(), regions.tolist(), strict=True)
    ]
    shown = _table(("place", "regions", "bytes", "of all"), rows[:most])
    if len(rows) > most:
        sizes = list(held.values())
        shown += f"\n... {len(rows) - most} more places; {in_words(min(sizes))} to {in_words(max(sizes))} each"
    return shown


def tensors_table(layout: Layout, most: int = 40) -> str:
    """Every tensor, equal ones in one line: shape, into how many regions it is cut, how often it is held."""
    rows = []
    for names, held in alike(layout):
        copies = count(held)
        times = f"{copies.least}" if copies.least == copies.most else f"{copies.least}-{copies.most}"
        shape = "x".join(map(str, held.shape)) or "scalar"
        label = names[0] + (f" (+{len(names) - 1} alike)" if len(names) > 1 else "")
        rows.append((label, f"{held.dtype} {shape}", f"{len(np.unique(held.places))}", f"{len(held)}", times))
    shown = _table(("tensor", "is", "places", "regions", "copies"), rows[:most])
    return shown + (f"\n... {len(rows) - most} more" if len(rows) > most else "")


def drawing(layout: Layout, name: str, rows: int = 16, columns: int = 64) -> str:
    """One tensor as a grid of characters, one for each set of places that hold the same elements.

    Dimensions after the second are drawn as if they were columns; a large tensor is sampled in even steps.
    """
    held = layout.tensors[name]
    shape = held.shape
    high = shape[0] if len(shape) > 1 else 1
    wide = held.numel // max(high, 1)
    at_rows = np.unique(np.linspace(0, max(high - 1, 0), min(high, rows)).round().astype(np.int64))
    at_columns = np.unique(np.linspace(0, max(wide - 1, 0), min(wide, columns)).round().astype(np.int64))
    legend: dict[tuple[int, ...], str] = {}
    lines = []
    for row in at_rows.tolist():
        line = ""
        for column in at_columns.tolist():
            index = np.array(np.unravel_index(row * wide + column, shape) if shape else (), dtype=np.int64)
            inside = (held.boxes.offsets <= index).all(axis=1) & (index < held.boxes.ends).all(axis=1)
            who = tuple(sorted(set(held.places[inside].tolist())))
            if who not in legend:
                legend[who] = _symbol(who, set(legend.values()))
            line += legend[who]
        lines.append(line)
    sampled = "" if (len(at_rows), len(at_columns)) == (high, wide) else ", sampled"
    head = f"{name}: {held.dtype} {'x'.join(map(str, shape)) or 'scalar'}{sampled}"
    said = [f"  {symbol} {_names(layout.places, who)}" for who, symbol in legend.items()]
    return "\n".join([head, *(f"  {line}" for line in lines), *said])


def _symbol(who: tuple[int, ...], used: set[str]) -> str:
    """A digit for a place alone, its own number where that is free; a letter for several; "#" when all are used up."""
    if not who:
        return _NOBODY
    if len(who) == 1 and who[0] < len(_ALONE):
        return _ALONE[who[0]]
    return next((symbol for symbol in _SHARED if symbol not in used), _ANYBODY)


def _names(places: Sequence[Place], rows: Iterable[int]) -> str:
    """The places of a set, runs of numbered ones shortened: "rank 0-3, 8"."""
    named = [places[row] for row in rows]
    if not named:
        return "nobody"
    numbers = [int(place.name) for place in named if place.name.isdigit()]
    kinds = {place.kind for place in named}
    if len(numbers) < len(named) or len(kinds) > 1:
        return ", ".join(map(str, named))
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return f"{kinds.pop()} " + ", ".join(f"{low}-{high}" if low < high else f"{low}" for low, high in runs)


def plan_table(plan: Plan, most: int = 16) -> str:
    """What a plan moves: totals, and what each place sends and gets."""
    sent, received = plan.sent(), plan.received()
    places = list(dict.fromkeys([*sent, *received]))
    rows = [
        (str(place), in_words(sent.get(place, 0)), in_words(received.get(place, 0)))
        for place in places
        if sent.get(place) or received.get(place)
    ]
    total = plan.moved_bytes + plan.local_bytes
    head = [
        f"{len(plan):,} moves: {in_words(plan.moved_bytes)} between places, {in_words(plan.local_bytes)} "
        f"({plan.local_bytes / max(total, 1):.1%}) already there"
    ]
    if plan.moved_bytes:
        senders = [size for size in sent.values() if size]
        mean = sum(senders) / len(senders)
        head.append(f"{len(senders)} senders, the busiest with {max(senders) / mean:.2f} times the mean")
    shown = [*head, _table(("place", "sends", "gets"), rows[:most])] if rows else head
    return "\n".join(shown) + (f"\n... {len(rows) - most} more places" if len(rows) > most else "")


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    widths = [max(len(row[column]) for row in (head, *rows)) for column in range(len(head))]
    lines = []
    for row in (head, *rows):
        cells = [
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
