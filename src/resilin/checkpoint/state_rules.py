"""Where the state of an optimizer lies, given where the parameters lie.

A state of its parameter's shape lies like the parameter; a state without dimensions is the same everywhere. Every other
shape could mean anything (a factor of a matrix, one number a block, a preconditioner), so it declares its rule or is
refused by name: a guess that is wrong would still load, as other numbers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Protocol

import numpy as np

from resilin.checkpoint.errors import CheckpointError
from resilin.layout import Holdings, Layout, Region, merge


class StateRule(Protocol):
    """From the holdings of a parameter to the regions of a state."""

    def regions(self, parameter: Holdings, shape: tuple[int, ...]) -> Iterable[tuple[int, Region]]:
        """(row in the table of places, region of the state) of everyone who holds some of it.

        Raises:
            ValueError: why this state cannot follow from this parameter.
        """


@dataclass(frozen=True)
class Replicated:
    """Whoever holds some of the parameter holds all of the state, with equal values."""

    def regions(self, parameter: Holdings, shape: tuple[int, ...]) -> Iterable[tuple[int, Region]]:
        """Everything, at each place."""
        return [(place, Region.whole(shape)) for place in np.unique(parameter.places).tolist()]


@dataclass(frozen=True)
class Reduced:
    """A factor: the parameter's dimensions without some of them, as Adafactor's row and column means are.

    Attributes:
        dims: of the parameter, which the state does not have. Ranks that differ only there have equal values.
    """

    dims: tuple[int, ...]

    def regions(self, parameter: Holdings, shape: tuple[int, ...]) -> Iterable[tuple[int, Region]]:
        """The parameter's boxes in the dimensions that are left."""
        count = len(parameter.shape)
        gone = {dim % count for dim in self.dims}
        left = [dim for dim in range(count) if dim not in gone]
        if shape != tuple(parameter.shape[dim] for dim in left):
            raise ValueError(
                f"a parameter {list(parameter.shape)} without dimensions {sorted(gone)} is not {list(shape)}"
            )
        found: dict[tuple[int, Region], None] = {}
        for place, box in zip(parameter.places.tolist(), parameter.boxes, strict=True):
            region = Region(tuple(box.offsets[dim] for dim in left), tuple(box.sizes[dim] for dim in left))
            found[place, region] = None
        return list(found)


@dataclass(frozen=True)
class Blocks:
    """One number for each block of consecutive elements, as the scales of 8-bit moments are.

    Attributes:
        size: elements of a block, in the parameter's row-major order; the last one may be shorter.
    """

    size: int

    def regions(self, parameter: Holdings, shape: tuple[int, ...]) -> Iterable[tuple[int, Region]]:
        """The blocks that lie inside each place's elements."""
        blocks = -(-parameter.numel // self.size)
        if shape != (blocks,):
            raise ValueError(
                f"{parameter.numel} elements in blocks of {self.size} have {blocks} numbers, not {list(shape)}"
            )
        runs: dict[int, list[tuple[int, int]]] = {}
        for place, box in zip(parameter.places.tolist(), parameter.boxes, strict=True):
            runs.setdefault(place, []).extend(box.flat(parameter.shape))
        found = []
        for place, mine in runs.items():
            for start, end in _joined(mine):
                if start % self.size or (end % self.size and end != parameter.numel):
                    raise ValueError(
                        f"elements {start} to {end} at one place cut blocks of {self.size}: cut the parameter at "
                        "multiples of the block"
                    )
                first = start // self.size
                found.append((place, Region((first,), (-(-end // self.size) - first,))))
        return found


def _joined(runs: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Runs (first, count) as ranges (start, end), those that touch as one."""
    ranges: list[tuple[int, int]] = []
    for start, count in sorted(runs):
        if ranges and ranges[-1][1] == start:
            ranges[-1] = ranges[-1][0], start + count
        else:
            ranges.append((start, start + count))
    return ranges


@dataclass(frozen=True)
class StateTensor:
    """A tensor of an optimizer's state.

    Attributes:
        parameter: the name of its parameter in the layout.
        shape: of the whole.
        dtype: its name in safetensors.
    """

    parameter: str
    shape: tuple[int, ...]
    dtype: str


def with_states(
    parameters: Layout, states: Mapping[str, StateTensor], rules: Mapping[str, StateRule] | None = None
) -> Layout:
    """The layout of parameters and of the optimizer's state.

    A state of the parameter's shape has the parameter's addresses in its own buffer (where the parameter lies in a
    buffer that others share, in one called `<buffer>/<last part of the state's name>`); any other has its regions one
    after the other in a buffer of its own.

    Args:
        parameters: of all ranks.
        states: by their names in the tree.
        rules: for the others, by patterns of names ("*/exp_avg_sq_row"); the first that matches counts.

    Raises:
        CheckpointError: naming a state that has another shape and no rule, or whose rule does not fit.
    """
    buffers = {name: row for row, name in enumerate(parameters.buffers)}
    made: dict[str, Holdings] = {}
    for name, state in states.items():
        if state.parameter not in parameters.tensors:
            raise CheckpointError(f"state {name!r} belongs to {state.parameter!r}, which is not in the layout")
        parameter = parameters.tensors[state.parameter]
        rule = next((rule for pattern, rule in (rules or {}).items() if fnmatchcase(name, pattern)), None)
        if rule is None and state.shape == ():
            rule = Replicated()
        if rule is None and state.shape != parameter.shape:
            raise CheckpointError(
                f"state {name!r} has shape {list(state.shape)} and its parameter {state.parameter!r} "
                f"{list(parameter.shape)}: which part of it belongs to which part of the parameter is not known; "
                "give a rule for it (Replicated, Reduced, Blocks), or leave it out of the checkpoint"
            )
        if rule is None:
            last = name.rpartition("/")[2]
            rows = [buffers.setdefault(f"{old}/{last}", len(buffers)) for old in parameters.buffers]
            own = np.array([*rows, -1], dtype=np.int32)[parameter.buffers]
            made[name] = replace(parameter, dtype=state.dtype, buffers=own)
            continue
        try:
            made[name] = Holdings.of(state.shape, state.dtype, rule.regions(parameter, state.shape))
        except ValueError as error:
            raise CheckpointError(f"state {name!r}: {error}") from None
    return merge(parameters, Layout(parameters.places, made, tuple(buffers)))
