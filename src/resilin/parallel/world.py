"""A worker's place among all workers, and the groups it belongs to."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property

import numpy as np
import torch.distributed as dist

from resilin.layout import Mesh, Place
from resilin.layout import rank as rank_place
from resilin.parallel.degrees import Degrees
from resilin.parallel.errors import ParallelError
from resilin.parallel.group import Group, make_groups, of_all


class World:
    """All workers of a job, on the meshes of their degrees, as one of them sees them.

    Where workers stand can be asked before they are connected; groups cannot. These are made when they are first asked
    for, by all workers together: every worker asks for the same ones in the same order.

    Args:
        degrees: whose product is the number of workers.
        rank: this worker's number.
    """

    def __init__(self, degrees: Degrees, rank: int = 0) -> None:
        self.degrees, self.rank = degrees, rank
        self.mesh, self.expert_mesh = degrees.mesh, degrees.expert_mesh
        if not 0 <= rank < degrees.workers:
            raise ParallelError(f"there is no rank {rank} among {degrees.workers} workers ({degrees})")
        self._groups: dict[tuple[str, ...], Group] = {}

    def __str__(self) -> str:
        return f"{self.size} workers ({self.degrees})"

    @property
    def where(self) -> str:
        """This worker's place in words: its coordinates on the axes that have more than one."""
        said = {"pp": "pipeline stage", "rep": "replica", "dp": "data", "cp": "context", "tp": "tensor"}
        return ", ".join(f"{word} {self.coordinate(axis)}" for axis, word in said.items() if self.axis(axis) > 1)

    @property
    def size(self) -> int:
        """How many workers."""
        return self.degrees.workers

    @cached_property
    def place(self) -> Place:
        """Where this worker's tensors live, in layouts."""
        return rank_place(self.rank)

    def coordinate(self, axis: str) -> int:
        """Where this worker stands on an axis of either mesh."""
        return int(self._mesh_of((axis,)).coordinates()[axis][self.rank])

    def axis(self, axis: str) -> int:
        """The size of an axis of either mesh."""
        return self._mesh_of((axis,)).axis(axis)

    def group(self, *axes: str) -> Group:
        """The workers that differ from this one on these axes only, in the mesh's order.

        All workers must ask together.
        """
        self._connected()
        if axes not in self._groups:
            self._groups[axes] = self._make(axes)
        return self._groups[axes]

    @cached_property
    def everyone(self) -> Group:
        """All workers, who ask for it together the first time."""
        self._connected()
        return of_all() if self.size > 1 else Group.alone()

    def _connected(self) -> None:
        if self.size == 1:
            return
        if not dist.is_initialized():
            raise ParallelError(f"{self} have to be connected first: see `join`")
        if dist.get_world_size() != self.size:
            raise ParallelError(f"{self}, but {dist.get_world_size()} are connected")

    def members(self, *axes: str) -> list[tuple[int, ...]]:
        """All groups of workers that differ on these axes only."""
        cells = self._mesh_of(axes).cells(without=axes)
        return [tuple(np.flatnonzero(cells == cell).tolist()) for cell in dict.fromkeys(cells.tolist())]

    def _make(self, axes: tuple[str, ...]) -> Group:
        members = self.members(*axes)
        if len(members) == 1:
            return self.everyone
        return make_groups(members, self.rank, "+".join(axes))

    def _mesh_of(self, axes: Iterable[str]) -> Mesh:
        wanted = set(axes)
        for mesh in (self.mesh, self.expert_mesh):
            if wanted <= {name for name, _ in mesh.axes}:
                return mesh
        raise ParallelError(f"no mesh has the axes {', '.join(sorted(wanted))}: {self.mesh}; {self.expert_mesh}")
