"""A rank's part of a model: an ordinary module whose parameters are parts of the whole ones, and what each part is."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cache

import numpy as np
import torch
from torch import Tensor, nn

from resilin.layout import Cut, Layout, Mesh, ParamSpec, layout_of
from resilin.layout.local import Local
from resilin.parallel.dtypes import DTYPES
from resilin.parallel.exchange import add_up_all
from resilin.parallel.group import Group


def shapes_of(model: nn.Module) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shape and dtype of every parameter, tied ones once."""
    return {name: (tuple(parameter.shape), DTYPES[parameter.dtype]) for name, parameter in model.named_parameters()}


@dataclass(frozen=True, slots=True)
class LocalParameter:
    """What one parameter of a rank's model is.

    Attributes:
        name: as in the whole model.
        spec: the whole, and how it was cut.
        sum_over: the groups of ranks over which its gradient has to be summed: each rank of one has only a part of
            the sum. One after the other.
        first: whether no rank before this one, on the axes that were cut, holds the same: so each element of the
            whole is counted once in a norm.
    """

    name: str
    spec: ParamSpec
    sum_over: tuple[Group, ...] = ()
    first: bool = True


@dataclass(frozen=True)
class LocalModel:
    """A module with local parameters.

    Attributes:
        module: as before, but for its parameters' sizes and what moves activations between ranks.
        parameters: by name, in the module's order.
        axes: the groups of the mesh axes that cut it.
    """

    module: nn.Module
    parameters: dict[str, LocalParameter]
    axes: dict[str, Group] = field(default_factory=dict)

    @classmethod
    def of(cls, module: nn.Module) -> LocalModel:
        """A model of which this rank has everything."""
        return cls(
            module,
            {name: LocalParameter(name, ParamSpec(*known)) for name, known in shapes_of(module).items()},
        )

    @property
    def mesh(self) -> Mesh:
        """Of the axes that cut the model."""
        return Mesh(tuple((axis, group.size) for axis, group in self.axes.items()))

    @property
    def rank(self) -> int:
        """This process's number on `mesh`."""
        return int(np.ravel_multi_index([g.index for g in self.axes.values()], [g.size for g in self.axes.values()]))

    def part(self, name: str, whole: Tensor) -> Tensor:
        """This rank's part of a tensor of the shape of a whole parameter: its value, or its gradient.

        Args:
            name: of the parameter.
            whole: on any device.

        Returns:
            A tensor of its own memory; padding is zeros.
        """
        if not self.axes:
            return whole.clone()
        return cut_out(self.parameters[name].spec, self.mesh, self.rank, whole)

    def pieces(self, name: str) -> list[Piece]:
        """Which pieces of a whole parameter this rank has, and where in its own."""
        return list(pieces_of(self.parameters[name].spec.local(self.mesh), self.mesh, self.rank))

    @torch.no_grad()
    def fill(self, values: Callable[[str, tuple[int, ...]], Tensor]) -> None:
        """Give every parameter its part of some whole values, made one after the other.

        Args:
            values: (name, shape of the whole) -> the whole.
        """
        for name, parameter in self.module.named_parameters():
            parameter.copy_(self.part(name, values(name, self.parameters[name].spec.shape)))

    @torch.no_grad()
    def take(self, parts: Mapping[str, Tensor]) -> None:
        """Give every parameter the values of its part, without padding, as a checkpoint holds them.

        Args:
            parts: by name, of what `layout` says this rank has.
        """
        for name, parameter in self.module.named_parameters():
            ends = [
                max(place.stop for place in places) for places in zip(*(t for _, t in self.pieces(name)), strict=True)
            ]
            real = parameter[tuple(slice(0, end) for end in ends)]
            if real.numel() < parameter.numel():
                parameter.zero_()
            real.copy_(parts[name])

    def layout(self, mesh: Mesh, prefix: str = "") -> Layout:
        """Who holds what: what checkpoints are read and written by.

        Args:
            mesh: of all ranks, with at least the axes that cut the model.
            prefix: put before the parameters' names.
        """
        return layout_of({prefix + name: known.spec for name, known in self.parameters.items()}, mesh)

    def extended(self, axis: str, group: Group, cuts: Mapping[str, tuple[Cut, ...]]) -> LocalModel:
        """The same after one more axis has cut it; the module is the same object."""
        parameters = {
            name: replace(known, spec=replace(known.spec, cuts=(*known.spec.cuts, *cuts.get(name, ()))))
            for name, known in self.parameters.items()
        }
        return LocalModel(self.module, parameters, {**self.axes, axis: group})

    def sum_gradients(self) -> None:
        """Sum `.grad` over the ranks where each rank has only a part of the sum; once a step, by all ranks together.

        A gradient that a rank does not have counts as zeros.
        """
        for groups, tensors in self._summed():
            for group in groups:
                add_up_all(tensors, group)

    def _summed(self) -> Iterator[tuple[tuple[Group, ...], list[Tensor]]]:
        """Gradients that are summed together, over the same groups."""
        alike: dict[tuple[tuple[int, ...], ...], tuple[tuple[Group, ...], list[Tensor]]] = {}
        for name, parameter in self.module.named_parameters():
            groups = tuple(group for group in self.parameters[name].sum_over if group.size > 1)
            if not groups or not parameter.requires_grad:
                continue
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            key = tuple(group.ranks for group in groups)
            alike.setdefault(key, (groups, []))[1].append(parameter.grad)
        yield from alike.values()


def cut_out(spec: ParamSpec, mesh: Mesh, rank: int, whole: Tensor) -> Tensor:
    """What a rank of a mesh has of a whole tensor.

    Args:
        spec: whose cuts keep the tensor's dimensions.
        mesh: the ranks.
        rank: which.
        whole: of the shape that `spec` says; on the meta device too.

    Returns:
        A tensor of its own memory; padding is zeros.

    Raises:
        ValueError: the tensor has another shape, or the rank holds none of it.
    """
    if tuple(whole.shape) != spec.shape:
        raise ValueError(f"a tensor of shape {list(whole.shape)} was given for one of shape {list(spec.shape)}")
    local = spec.local(mesh)
    shape = local.shapes_on(mesh)[rank]
    if shape is None or local.starts is not None:
        raise ValueError(f"rank {rank} has no part of it that has the tensor's own dimensions: {spec.cuts}")
    if whole.device.type == "meta":
        return whole.new_empty(shape)
    pieces = list(pieces_of(local, mesh, rank))
    part = whole.new_empty(shape) if _filled(pieces, shape) else whole.new_zeros(shape)
    for source, target in pieces:
        part[target].copy_(whole[source])
    return part


Piece = tuple[tuple[slice, ...], tuple[slice, ...]]
"""Where a piece lies in the whole tensor, and where in a rank's own."""


def pieces_of(local: Local, mesh: Mesh, rank: int) -> Iterator[Piece]:
    """The pieces of the whole tensor that a rank has, where its own tensor is not flat."""
    mine = int(local._virtual(mesh)[rank])
    for row in np.flatnonzero(local.rank == mine).tolist():
        sizes = local.whole.sizes[row].tolist()
        begins = local.whole.offsets[row].tolist(), local.own[row].tolist()
        source, target = (tuple(slice(b, b + n) for b, n in zip(begin, sizes, strict=True)) for begin in begins)
        yield source, target


def _filled(pieces: list[Piece], shape: tuple[int, ...]) -> bool:
    sizes = [[place.stop - place.start for place in target] for _, target in pieces]
    return sum(int(np.prod(size, dtype=np.int64)) for size in sizes) == int(np.prod(shape, dtype=np.int64))


@cache
def holders(spec: ParamSpec, mesh: Mesh) -> list[tuple[int, ...]]:
    """For each rank of a mesh the ranks, it among them, that hold the same part of a tensor."""
    local = spec.local(mesh)
    pieces = [repr(sorted(map(str, pieces_of(local, mesh, rank)))) for rank in range(mesh.size)]
    return [tuple(other for other in range(mesh.size) if pieces[other] == pieces[rank]) for rank in range(mesh.size)]
