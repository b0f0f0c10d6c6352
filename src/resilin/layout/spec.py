"""What to say of a parameter so that its layout follows: shape, dtype, and what cuts it."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from resilin.layout.cuts import Cut, Only, Window
from resilin.layout.errors import LayoutError
from resilin.layout.holdings import Holdings
from resilin.layout.layout import Layout
from resilin.layout.local import Local
from resilin.layout.mesh import Mesh
from resilin.layout.place import Place, rank


@dataclass(frozen=True)
class ParamSpec:
    """One parameter: what it is, and how a mesh cuts it.

    Attributes:
        shape: of the whole, without padding.
        dtype: its name in safetensors.
        cuts: in order; none: every rank has a copy.
        padded: the shape that is cut, where it is larger (a vocabulary made to divide); () is `shape`. What lies
            outside `shape` is in nobody's region, so it is never saved, moved or read.
    """

    shape: tuple[int, ...]
    dtype: str = "F32"
    cuts: tuple[Cut, ...] = ()
    padded: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.padded and (
            len(self.padded) != len(self.shape) or any(p < s for p, s in zip(self.padded, self.shape, strict=True))
        ):
            raise LayoutError(f"shape {list(self.shape)} cannot be padded to {list(self.padded)}, which is smaller")

    def local(self, mesh: Mesh) -> Local:
        """What every rank has of it."""
        local = Local.uncut(self.shape, self.padded or self.shape)
        for cut in self.cuts:
            local = local.cut(cut, mesh)
        return local

    def local_shapes(self, mesh: Mesh) -> list[tuple[int, ...] | None]:
        """The shape of each rank's own tensor, padding included; None where it has none, (n,) where it is flat."""
        if not self.cuts:
            return [self.padded or self.shape] * mesh.size
        return self.local(mesh).shapes_on(mesh)


def layout_of(
    specs: Mapping[str, ParamSpec], mesh: Mesh, place: Callable[[int], Place] = rank, buffers: Sequence[str] = ()
) -> Layout:
    """The layout that specifications give on a mesh.

    Parameters with equal specifications share their holdings, so that a model's many equal layers cost one.

    Args:
        specs: by parameter name.
        mesh: the ranks.
        place: the place of a rank's number.
        buffers: names of buffers, to fix their order; others are added.

    Raises:
        LayoutError: naming the parameter whose specification does not fit its shape or the mesh.
    """
    table = {name: row for row, name in enumerate(buffers)}
    made: dict[ParamSpec, Holdings] = {}
    tensors = {}
    for name, spec in specs.items():
        if spec not in made:
            try:
                local = spec.local(mesh)
                if local.buffer:
                    table.setdefault(local.buffer, len(table))
                made[spec] = local.holdings(mesh, spec.dtype, table.get(local.buffer, -1))
            except LayoutError as error:
                raise LayoutError(f"{name}: {error}") from None
        tensors[name] = made[spec]
    return Layout(tuple(place(number) for number in range(mesh.size)), tensors, tuple(table))


@dataclass(frozen=True)
class SpecRule:
    """What cuts the parameters whose names match.

    Attributes:
        pattern: a regular expression that must match the whole name.
        cuts: as in `ParamSpec`.
        pad: (dimension, multiple): it is padded to a multiple before it is cut.
    """

    pattern: str
    cuts: tuple[Cut, ...] = ()
    pad: tuple[tuple[int, int], ...] = ()


def specs_of(
    shapes: Mapping[str, tuple[tuple[int, ...], str]], rules: Sequence[SpecRule], strict: bool = True
) -> dict[str, ParamSpec]:
    """Specifications of a model's parameters from rules on their names; what no rule matches is replicated.

    Args:
        shapes: name -> (shape, dtype).
        rules: a name may match one of them at most.
        strict: every rule must match something, which finds the modules that were renamed.

    Raises:
        LayoutError: for a name that two rules match, and a rule that matches none.
    """
    used = dict.fromkeys(range(len(rules)), False)
    specs = {}
    for name, (shape, dtype) in shapes.items():
        matching = [number for number, rule in enumerate(rules) if re.fullmatch(rule.pattern, name)]
        if len(matching) > 1:
            both = " and ".join(repr(rules[number].pattern) for number in matching[:2])
            raise LayoutError(f"{name}: the rules {both} both match; make one of them narrower")
        spec = ParamSpec(shape, dtype)
        for number in matching:
            used[number] = True
            rule, padded = rules[number], list(shape)
            for dim, multiple in rule.pad:
                padded[dim] = -(-padded[dim] // multiple) * multiple
            spec = replace(spec, cuts=rule.cuts, padded=tuple(padded) if rule.pad else ())
        specs[name] = spec
    if strict and not all(used.values()):
        lost = next(rules[number].pattern for number, matched in used.items() if not matched)
        raise LayoutError(f"the rule {lost!r} matches no parameter: was a module renamed? (strict=False allows it)")
    return specs


def flat_group(
    specs: Mapping[str, ParamSpec], mesh: Mesh, axis: str, buffer: str = "flat", multiple: int = 2
) -> dict[str, ParamSpec]:
    """One ZeRO-1/2 optimizer group: the parameters flattened, joined, padded and cut in equal ranges over an axis.

    Each cell of the mesh without the axis (a pipeline stage and tensor rank) has a buffer of its own with the
    parameters it holds, in the order given.

    Args:
        specs: the group's parameters in order, cut by other axes as they may be.
        mesh: the ranks.
        axis: that cuts the buffer.
        buffer: its name.
        multiple: the buffer's length is padded to a multiple of this times the axis's size (DeepSpeed: 2).

    Returns:
        The specifications with the cut added.
    """
    ways = mesh.axis(axis)
    cells = mesh.cells([axis])
    first = [int(np.flatnonzero(cells == cell)[0]) for cell in range(mesh.size // ways)]
    used = [0] * len(first)
    offsets: dict[str, list[int]] = {}
    for name, spec in specs.items():
        shapes = spec.local_shapes(mesh)
        offsets[name] = []
        for cell, one in enumerate(first):
            shape = shapes[one]
            offsets[name].append(-1 if shape is None else used[cell])
            used[cell] += 0 if shape is None else int(np.prod(shape, dtype=np.int64))
    ranges = tuple(-(-count // (multiple * ways)) * multiple for count in used)
    return {
        name: replace(spec, cuts=(*spec.cuts, Window(axis, buffer, tuple(offsets[name]), ranges)))
        for name, spec in specs.items()
    }


def staged(
    specs: Mapping[str, ParamSpec], stages: Mapping[str, Sequence[int]], axis: str = "pp"
) -> dict[str, ParamSpec]:
    """Specifications with the pipeline stages that hold each parameter; what `stages` does not name is on all.

    Args:
        specs: by name.
        stages: name -> coordinates of the axis; several for tied weights.
        axis: of the mesh.
    """
    return {
        name: replace(spec, cuts=(Only(axis, tuple(stages[name])), *spec.cuts)) if name in stages else spec
        for name, spec in specs.items()
    }
