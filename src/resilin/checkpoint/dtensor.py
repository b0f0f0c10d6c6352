"""The layout of a state whose tensors are DTensors: who holds which region follows from mesh and placements.

Each rank knows the tensors of its own tree. What they say of themselves (shape, mesh, placements) is put together
once, so pipeline stages, each with other tensors on its own part of the mesh, need nothing declared.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from resilin.checkpoint.coordinator import Coordinator, together
from resilin.checkpoint.errors import CheckpointError
from resilin.checkpoint.tensor_record import DTYPE_NAMES, layout_dtype
from resilin.layout import Layout, Place, Region, merge, rank
from resilin.layout.cuts import Shard
from resilin.layout.mesh import Mesh
from resilin.layout.spec import ParamSpec, layout_of

Spec = list[Any]
"""Shape, dtype, mesh (nested ranks; None for a plain tensor), placements, as JSON."""


def is_dtensor(tensor: object) -> bool:
    """Whether it is a DTensor; asks for the name, since importing the class costs a second."""
    return isinstance(tensor, Tensor) and hasattr(tensor, "placements") and hasattr(tensor, "device_mesh")


def local_part(tensor: Any) -> Tensor:
    """This rank's elements."""
    return tensor.to_local().detach() if is_dtensor(tensor) else tensor  # type: ignore[no-any-return]


def spec_of(name: str, tensor: Any) -> Spec:
    """What one tensor says of itself.

    Raises:
        CheckpointError: for a placement whose elements are not the tensor's own (partial sums), by name.
    """
    shape, dtype = list(tensor.shape), layout_dtype(DTYPE_NAMES[tensor.dtype])
    if not is_dtensor(tensor):
        return [shape, dtype, None, []]
    placements = []
    for placement in tensor.placements:
        if placement.is_partial():
            raise CheckpointError(
                f"tensor {name!r} is a DTensor of partial sums ({placement}): reduce it before it is saved"
            )
        if placement.is_replicate():
            placements.append([-1, 1])
        elif hasattr(placement, "dim"):
            placements.append([placement.dim % len(shape), getattr(placement, "split_factor", 1)])
        else:
            raise CheckpointError(f"tensor {name!r} is a DTensor with placement {placement}, which is unknown here")
    return [shape, dtype, tensor.device_mesh.mesh.tolist(), placements]


def param_spec(shape: Sequence[int], dtype: str, mesh: Sequence[int], placements: Sequence[Sequence[int]]) -> ParamSpec:
    """What placements on a mesh (whose axes are called "0", "1", ...) say, in the words of the layout.

    Each mesh dimension cuts its tensor dimension as `torch.chunk` does, within what the earlier ones left: from left to
    right, but a strided shard comes after those on its right whose number is its split factor (FSDP after tensor
    parallelism).

    Args:
        shape: of the whole tensor.
        dtype: its name in safetensors.
        mesh: its sizes.
        placements: for each mesh dimension the tensor's dimension (-1: replicated) and the split factor.
    """
    order: dict[int, list[int]] = {}
    for number in reversed(range(len(mesh))):
        dim, factor = placements[number]
        if dim < 0:
            continue
        chain, before, position = order.setdefault(dim, []), 1, 0
        while before < factor and position < len(chain):
            before *= mesh[chain[position]]
            position += 1
        chain.insert(position, number)
    cuts = tuple(Shard(str(number), dim) for dim, chain in order.items() for number in chain)
    return ParamSpec(tuple(shape), dtype, cuts)


def layout_of_specs(by_rank: Sequence[Mapping[str, Spec]]) -> Layout:
    """The layout of all ranks from what each said of its tensors; plain tensors are held whole by who has them.

    Raises:
        CheckpointError: where ranks contradict each other, naming the tensor.
    """
    first: dict[str, Spec] = {}
    checked: set[str] = set()
    plain: dict[str, tuple[tuple[int, ...], str]] = {}
    held: list[tuple[str, Place, Region]] = []
    on_mesh: dict[str, dict[str, ParamSpec]] = {}
    for number, specs in enumerate(by_rank):
        for name, spec in specs.items():
            shape, dtype, mesh, placements = spec
            if first.setdefault(name, spec) != spec:
                raise CheckpointError(
                    f"tensor {name!r}: rank {number} says {spec} of it, and one before it {first[name]}"
                )
            if mesh is not None and name not in checked and (largest := int(np.max(mesh))) >= len(by_rank):
                raise CheckpointError(
                    f"tensor {name!r} is a DTensor over rank {largest}, but {len(by_rank)} ranks save or load here; "
                    "give every CheckpointFolder a coordinator of all ranks"
                )
            checked.add(name)
            if mesh is None:
                plain[name] = tuple(shape), dtype
                held.append((name, rank(number), Region.whole(shape)))
            else:
                sizes = np.array(mesh).shape
                on_mesh.setdefault(json.dumps(mesh), {})[name] = param_spec(shape, dtype, sizes, placements)
    layouts = [Layout.of(plain, held)]
    for text, params in on_mesh.items():
        ranks = np.array(json.loads(text))
        mesh = Mesh(tuple((str(number), size) for number, size in enumerate(ranks.shape)))
        places = ranks.reshape(-1).tolist()
        layouts.append(layout_of(params, mesh, lambda number, places=places: rank(places[number])))  # type: ignore[misc]
    made = merge(*layouts)
    missing = [place for place in map(rank, range(len(by_rank))) if place not in made.places]
    return Layout((*made.places, *missing), made.tensors, made.buffers)


class DTensorLayouts:
    """Agrees with the other ranks on the layout, and asks again only when a tensor changed at one of them."""

    def __init__(self, coordinator: Coordinator) -> None:
        self._coordinator = coordinator
        self._known: tuple[int, Layout] | None = None

    def of(self, tensors: Mapping[str, Any]) -> Layout:
        """The layout of this rank's tensors and those of all others. Every rank calls it.

        Raises:
            CheckpointError: where ranks contradict each other.
        """
        specs: dict[str, Spec] = {}

        def mine() -> int:
            specs.update({name: spec_of(name, tensor) for name, tensor in tensors.items()})
            mark = zlib.crc32(repr(sorted(specs.items())).encode())
            return mark if self._known is not None and self._known[0] == mark else -1

        same = together(self._coordinator, mine, lambda marks: all(mark >= 0 for mark in marks))
        if same and self._known is not None:
            return self._known[1]
        everyone = together(self._coordinator, lambda: specs, lambda parts: parts)
        self._known = zlib.crc32(repr(sorted(specs.items())).encode()), layout_of_specs(everyone)
        return self._known[1]
