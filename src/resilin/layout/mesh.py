"""Ranks on a grid with named axes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from resilin.layout.boxes import Ints
from resilin.layout.errors import LayoutError


@dataclass(frozen=True)
class Mesh:
    """A grid of ranks, numbered in row-major order: the last axis changes fastest.

    Attributes:
        axes: (name, size) from the outermost, such as `(("pp", 2), ("dp", 4), ("tp", 8))`.
    """

    axes: tuple[tuple[str, int], ...]

    def __post_init__(self) -> None:
        names = [name for name, _ in self.axes]
        if len(set(names)) != len(names):
            raise LayoutError(f"a mesh cannot have two axes of one name: {', '.join(names)}")
        for name, size in self.axes:
            if size < 1:
                raise LayoutError(f"mesh axis {name!r} has size {size}; it must be at least 1")

    @classmethod
    def of(cls, **sizes: int) -> Mesh:
        """`Mesh.of(pp=2, dp=4, tp=8)`."""
        return cls(tuple(sizes.items()))

    @classmethod
    def parse(cls, text: str) -> Mesh:
        """From `pp=2,dp=4,tp=8`.

        Raises:
            LayoutError: when it does not read so.
        """
        axes = []
        for item in filter(None, (part.strip() for part in text.split(","))):
            name, equals, size = item.partition("=")
            if not (equals and name.strip().isidentifier() and size.strip().isdigit()):
                raise LayoutError(f"a mesh is written as pp=2,dp=4,tp=8; {item!r} is no axis=size")
            axes.append((name.strip(), int(size)))
        return cls(tuple(axes))

    def __str__(self) -> str:
        return ",".join(f"{name}={size}" for name, size in self.axes)

    @property
    def size(self) -> int:
        """How many ranks."""
        return math.prod(size for _, size in self.axes)

    def axis(self, name: str) -> int:
        """The size of an axis; 1 for a name that is none of them, so that what is not cut there is whole."""
        return dict(self.axes).get(name, 1)

    def coordinates(self) -> Mapping[str, Ints]:
        """For each axis (ranks,) where every rank stands on it."""
        grid = np.indices([size for _, size in self.axes]).reshape(len(self.axes), -1)
        return {name: grid[row].astype(np.int64) for row, (name, _) in enumerate(self.axes)}

    def cells(self, without: Iterable[str] = ()) -> Ints:
        """(ranks,) the number of each rank on the grid that lacks some axes: ranks of one group have one number."""
        left = set(without)
        coordinates = self.coordinates()
        number = np.zeros(self.size, dtype=np.int64)
        for name, size in self.axes:
            if name not in left:
                number = number * size + coordinates[name]
        return number
