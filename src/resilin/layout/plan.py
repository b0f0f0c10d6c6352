"""From one layout to another with the least bytes moved: the one routine behind every kind of resharding."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from resilin.layout.boxes import Boxes, Ints, concatenate, distinct, overlaps, slabs
from resilin.layout.errors import LayoutError
from resilin.layout.holdings import Holdings
from resilin.layout.layout import Layout
from resilin.layout.moves import Plan, TensorMoves
from resilin.layout.region import Region
from resilin.layout.senders import Copies, choose

SMALLEST_PIECE = 1 << 16
"""Bytes below which a region is not divided among senders: a message costs more than it would save."""


@dataclass(frozen=True, eq=False)
class _Pieces:
    """What a pair of holdings has to do with each other, whichever tensors have it. K pieces, C classes.

    Attributes:
        copies: the source's holdings by class (regions that are equal).
        classes: (K,) the class each piece is taken from.
        target: (K,) row of the target's holdings.
        boxes: the pieces, for each target a tiling of its region.
        own: (K,) the row of the source's holdings at the target's own place, or -1.
    """

    copies: Copies
    classes: Ints
    target: Ints
    boxes: Boxes
    own: Ints


def plan(source: Layout, target: Layout, names: Iterable[str] | None = None) -> Plan:
    """The moves that turn one layout into another.

    What a place already holds is taken from itself and marked local; it is never fetched. Everything else reaches
    each place that wants it exactly once, so no set of moves has fewer bytes. Where several places hold the same
    region, senders share the work: the next piece goes to the one that has sent least, and a piece larger than its
    sender's fair share is divided among the copies.

    Args:
        source: what there is. Elements nobody wants are left where they are.
        target: what is wanted; it may lack tensors of the source, but not have others.
        names: only these tensors; None: all of the target.

    Raises:
        LayoutError: for a tensor that the source does not have, has in another shape or dtype, or lacks elements of.
    """
    listed = list(target.tensors) if names is None else list(names)
    own_row = np.full(len(target.places), -1, dtype=np.int64)
    rows = {place: row for row, place in enumerate(source.places)}
    for row, place in enumerate(target.places):
        own_row[row] = rows.get(place, -1)
    found: dict[tuple[int, int], _Pieces] = {}
    pairs: dict[str, tuple[Holdings, Holdings, _Pieces]] = {}
    for name in listed:
        have, want = _pair(name, source, target)
        key = id(have), id(want)
        if key not in found:
            try:
                found[key] = _pieces(have, want, own_row, len(source.places))
            except LayoutError as error:
                raise LayoutError(f"tensor {name!r} {list(want.shape)}: {error}") from None
        pairs[name] = have, want, found[key]
    return Plan(source, target, _choose_senders(pairs, len(source.places)))


def _pair(name: str, source: Layout, target: Layout) -> tuple[Holdings, Holdings]:
    if name not in target.tensors:
        raise LayoutError(f"the target layout has no tensor {name!r}")
    if name not in source.tensors:
        raise LayoutError(f"the source layout has no tensor {name!r}; the target wants it")
    have, want = source.tensors[name], target.tensors[name]
    if (have.shape, have.dtype) != (want.shape, want.dtype):
        raise LayoutError(
            f"tensor {name!r} is {have.dtype} {list(have.shape)} in the source layout, but the target wants "
            f"{want.dtype} {list(want.shape)}"
        )
    return have, want


def _pieces(have: Holdings, want: Holdings, own_row: Ints, places: int) -> _Pieces:
    boxes, number = distinct(have.boxes)
    copies = Copies.of(number, len(boxes))
    wanted, alike = distinct(want.boxes)  # many places want the same region: what overlaps it is found once
    classes, which, shared = overlaps(boxes, wanted)
    covered = np.bincount(which, shared.numel.astype(np.float64), minlength=len(wanted)).astype(np.int64)
    if (covered < wanted.numel).any():
        row = int((covered < wanted.numel).argmax())
        raise LayoutError(f"no place of the source layout holds all of {wanted.region(row)}")
    # Classes that share elements with another one: whoever wants of them must not take these twice.
    touching = np.bincount(overlaps(boxes, boxes)[1], minlength=len(boxes)) > 1
    tangled = np.bincount(which, touching[classes], minlength=len(wanted)) > 0
    counts = np.bincount(which, minlength=len(wanted))[alike]
    begins = np.concatenate([[0], np.cumsum(np.bincount(which, minlength=len(wanted)))])[:-1][alike]
    to = np.repeat(np.arange(len(want), dtype=np.int64), counts)
    piece = np.arange(len(to)) - np.repeat(np.cumsum(counts) - counts, counts) + np.repeat(begins, counts)
    made_classes, made_boxes = classes[piece], shared.take(piece)
    # A row for (class, place) where there is one: the first holding of that region at that place.
    keys = number * places + have.places
    order = np.argsort(keys, kind="stable")
    asked = made_classes * places + own_row[want.places[to]]
    at = np.minimum(np.searchsorted(keys[order], asked), max(len(order) - 1, 0))
    own = np.where((own_row[want.places[to]] >= 0) & (keys[order][at] == asked), order[at], -1) if len(to) else to
    made = _Pieces(copies, made_classes, to, made_boxes, own.astype(np.int64))
    return _untangle(made, want, tangled[alike], boxes) if tangled.any() else made


def _untangle(pieces: _Pieces, want: Holdings, tangled: NDArray[np.bool_], boxes: Boxes) -> _Pieces:
    """Where the source's regions overlap in part, take each element once: from the own place if it is there."""
    keep = ~tangled[pieces.target]
    classes, target, own = [pieces.classes[keep]], [pieces.target[keep]], [pieces.own[keep]]
    parts = [pieces.boxes.take(keep)]
    for row in np.flatnonzero(tangled).tolist():
        mine = np.flatnonzero(pieces.target == row)
        # Own pieces first, then large ones: fewer, longer messages.
        mine = mine[np.lexsort((-pieces.boxes.numel[mine], pieces.own[mine] < 0))]
        left: tuple[Region, ...] = (want.boxes.region(row),)
        for piece in mine.tolist():
            box = pieces.boxes.region(piece)
            taken = [part for part in (old & box for old in left) if part.numel]
            if not taken:
                continue
            left = tuple(rest for old in left for rest in old - box)
            classes.append(np.repeat(pieces.classes[piece], len(taken)))
            target.append(np.repeat(np.int64(row), len(taken)))
            own.append(np.repeat(pieces.own[piece], len(taken)))
            parts.append(Boxes.of(taken, boxes.dims))
            if not left:
                break
        if left:
            raise LayoutError(f"no place of the source layout holds {', '.join(map(str, left[:3]))}")
    return _Pieces(
        pieces.copies, np.concatenate(classes), np.concatenate(target), concatenate(parts), np.concatenate(own)
    )


def _choose_senders(pairs: dict[str, tuple[Holdings, Holdings, _Pieces]], places: int) -> dict[str, TensorMoves]:
    far = {
        name: int(pieces.boxes.numel[pieces.own < 0].sum()) * have.item_bytes
        for name, (have, _, pieces) in pairs.items()
    }
    load = np.zeros(places)
    fair = max(sum(far.values()) / max(places, 1) / 4, SMALLEST_PIECE)
    moves: dict[str, TensorMoves] = {}
    for name in sorted(far, key=lambda one: -far[one]):  # what weighs most first, the small ones even it out
        have, _, pieces = pairs[name]
        away = pieces.own < 0
        if far[name] and (pieces.copies.counts > 1).any():
            pieces = _divide(pieces, have.item_bytes, fair)
            away = pieces.own < 0
        rows = pieces.own.copy()
        nbytes = pieces.boxes.numel[away] * have.item_bytes
        rows[away] = choose(have, pieces.copies, pieces.classes[away], nbytes, load)
        moves[name] = TensorMoves(rows, pieces.target, pieces.boxes, ~away)
    return {name: moves[name] for name in pairs}


def _divide(pieces: _Pieces, item_bytes: int, fair: float) -> _Pieces:
    """Cut what is larger than a sender's fair share and held by several into slabs for each of them."""
    copies = pieces.copies.counts[pieces.classes]
    asked = np.bincount(pieces.classes[pieces.own < 0], minlength=len(pieces.copies.counts))[pieces.classes]
    parts = np.minimum(copies // np.maximum(asked, 1), (pieces.boxes.numel * item_bytes / fair).astype(np.int64))
    parts = np.where((pieces.own < 0) & (parts > 1), parts, 1)
    if (parts == 1).all():
        return pieces
    which, boxes = slabs(pieces.boxes, parts)
    return replace(
        pieces, classes=pieces.classes[which], target=pieces.target[which], boxes=boxes, own=pieces.own[which]
    )
