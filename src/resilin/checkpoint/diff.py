"""What differs between two checkpoints, whatever layouts wrote them: which tensors, by how much, and where."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from resilin.checkpoint.inspect import leaves
from resilin.checkpoint.reader import CheckpointReader
from resilin.checkpoint.spans import spans
from resilin.checkpoint.storage import Location
from resilin.checkpoint.tensor_read import WORDS
from resilin.checkpoint.tensor_record import TensorRecord, shape_in_file
from resilin.checkpoint.tree import Json
from resilin.layout import Region

_BYTES = 4 << 20  # of each side at once; their differences in double precision take some times more


@dataclass(frozen=True)
class ValuesDiffer:
    """A tensor some of whose elements have other bits.

    Attributes:
        name: its place in the tree.
        shape: of it.
        count: how many elements differ.
        first: the index of the first of them.
        worst: the index of the one that differs most.
        values: of both checkpoints there.
        largest: |a - b| there; infinite where one of the two is not a number.
    """

    name: str
    shape: tuple[int, ...]
    count: int
    first: tuple[int, ...]
    worst: tuple[int, ...]
    values: tuple[float | complex, float | complex]
    largest: float

    def __str__(self) -> str:
        many = f"{self.count:,} of {math.prod(self.shape):,} elements differ"
        worst = f"most at {list(self.worst)}, by {self.largest:.6g}: {self.values[0]} and {self.values[1]}"
        return f"{self.name} {list(self.shape)}: {many}, the first at {list(self.first)}; {worst}"


@dataclass(frozen=True)
class Other:
    """Anything else that differs: a value, a shape, a dtype, or something that is in one of the two only.

    Attributes:
        name: its place in the tree.
        words: what differs.
    """

    name: str
    words: str

    def __str__(self) -> str:
        return f"{self.name}: {self.words}"


def differences(
    first: Location, second: Location, *, tolerance: float = 0.0, parts: Collection[str] | None = None
) -> Iterator[ValuesDiffer | Other]:
    """Everything that differs, in the order of the first tree; tensors are read piece by piece, never whole.

    Elements differ when their bits do (so 0.0 and -0.0 differ, and a NaN equals the same NaN), and by more than the
    tolerance.

    Args:
        first: one checkpoint.
        second: the other.
        tolerance: |a - b| up to which elements count as equal; 0: bits must be equal.
        parts: only these top-level keys; None: everything.

    Raises:
        CheckpointError: one of them is damaged, or has no such part.
    """
    with CheckpointReader(first) as a, CheckpointReader(second) as b:
        ours, theirs = (
            {where: (tensor, value) for where, tensor, value in leaves(saved.tree(parts), ())} for saved in (a, b)
        )
        compared: set[tuple[str, str]] = set()
        for where, (tensor, value) in ours.items():
            if where not in theirs:
                yield Other(where, f"only in {first}")
                continue
            other, its_value = theirs[where]
            if tensor is None or other is None:
                if (tensor is None) != (other is None):
                    yield Other(where, f"a tensor in {first if other is None else second}, a value in the other")
                elif type(value) is not type(its_value) or value != its_value:
                    yield Other(where, f"{_short(value)} and {_short(its_value)}")
            elif (tensor, other) not in compared:  # tied places are one tensor
                compared.add((tensor, other))
                yield from _tensors(where, a, tensor, b, other, tolerance)
        for where in theirs:
            if where not in ours:
                yield Other(where, f"only in {second}")


def _short(value: Json) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _words(record: TensorRecord) -> str:
    return f"{record.dtype} {list(shape_in_file(record.dtype, record.shape))}"


def _tensors(
    where: str, a: CheckpointReader, name: str, b: CheckpointReader, other: str, tolerance: float
) -> Iterator[ValuesDiffer | Other]:
    mine, its = a.record(name), b.record(other)
    if (mine.dtype, mine.shape) != (its.dtype, its.shape):
        yield Other(where, f"{_words(mine)} and {_words(its)}")
        return
    limit = max(_BYTES * math.prod(mine.shape) // max(mine.bytes, 1), 1)
    count, first = 0, None
    worst: tuple[float, tuple[int, ...], tuple[float | complex, float | complex]] = (-1.0, (), (0.0, 0.0))
    for region, _, _ in spans(mine.shape, Region.whole(mine.shape), limit=limit, row=limit):
        x, y = a.tensor(name, region=region), b.tensor(other, region=region)
        differ = _words_of(x) != _words_of(y)
        if not bool(differ.any()):
            continue
        size = _distance(x, y).where(differ, torch.tensor(-1.0, dtype=torch.float64))
        if tolerance:
            differ &= size > tolerance
        if not bool(differ.any()):
            continue
        count += int(differ.sum())
        if first is None:
            first = _index(region, int(differ.reshape(-1).to(torch.uint8).argmax()))
        place = int(size.reshape(-1).argmax())
        if float(size.reshape(-1)[place]) > worst[0]:
            both = _number(x, place), _number(y, place)
            worst = float(size.reshape(-1)[place]), _index(region, place), both
    if first is not None:
        yield ValuesDiffer(where, mine.shape, count, first, worst[1], worst[2], worst[0])


def _words_of(tensor: Tensor) -> Tensor:
    return tensor.view(WORDS[tensor.element_size()])


def _wide(tensor: Tensor) -> Tensor:
    if tensor.dtype == torch.float4_e2m1fn_x2:
        tensor = tensor.view(torch.uint8)  # pairs of numbers: only whether they differ can be said
    return tensor.to(torch.complex128 if tensor.is_complex() else torch.float64)


def _distance(x: Tensor, y: Tensor) -> Tensor:
    return (_wide(x) - _wide(y)).abs().nan_to_num(nan=math.inf, posinf=math.inf)


def _number(tensor: Tensor, place: int) -> float | complex:
    found: float | complex = _wide(tensor.reshape(-1)[place : place + 1]).item()
    return found


def _index(region: Region, place: int) -> tuple[int, ...]:
    index = []
    for size in reversed(region.sizes):
        place, rest = divmod(place, size)
        index.append(rest)
    return tuple(o + i for o, i in zip(region.offsets, reversed(index), strict=True))
