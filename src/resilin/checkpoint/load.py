"""Loading a rank's part of a checkpoint, whatever layout wrote it: plan from files to memory, then read byte ranges."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from resilin.checkpoint.dtensor import is_dtensor, local_part
from resilin.checkpoint.errors import CheckpointError
from resilin.checkpoint.read import THREADS
from resilin.checkpoint.reader import CheckpointReader
from resilin.checkpoint.sharded import wanted_buffers
from resilin.checkpoint.share import part_of
from resilin.checkpoint.storage import Location
from resilin.checkpoint.tensor_record import DTYPES
from resilin.checkpoint.tree import Json, escape, put_together, take_apart
from resilin.layout import Layout, LayoutError, Place, Region
from resilin.nouns import Deferred, State

Views = Mapping[str, list[tuple[Region, Tensor]]]


@dataclass(frozen=True)
class Part:
    """What a rank holds of a state.

    Attributes:
        tree: with the rank's buffer at the place of each tensor: of the region's shape where it holds one region that
            fills it, one-dimensional otherwise, empty where it holds nothing.
        buffers: the layout's named buffers; the tree has views into them.
    """

    tree: State
    buffers: dict[str, Tensor]


def read_views(saved: CheckpointReader, views: Views, *, verify: bool = True) -> None:
    """Fill memory with regions of a checkpoint's tensors, several at once.

    Args:
        saved: the checkpoint.
        views: tensor -> (region, where it is to be), in the checkpoint's dtype.
        verify: compare checksums of all blocks that are read.

    Raises:
        CheckpointError: naming file and tensor; memory may then be filled in part.
    """
    with ThreadPoolExecutor(THREADS) as pool:
        for _ in pool.map(lambda name: saved.fill(name, views[name], verify=verify), views):
            pass


def load_part(
    location: Location,
    layout: Layout,
    place: Place,
    *,
    parts: Collection[str] | None = None,
    verify: bool = True,
) -> Part:
    """The part of a checkpoint that a place of a layout holds. Memory is new, so a failure leaves nothing half-loaded.

    Besides what is returned, no more memory is used than the largest piece that is read, and mostly much less.

    Args:
        location: of one step.
        layout: of all ranks; its tensors are named as in the tree. Dtypes are taken from the checkpoint.
        place: whose part.
        parts: only these top-level keys; None: everything.
        verify: compare checksums of all blocks that are read.

    Raises:
        CheckpointError: for a tensor that the checkpoint or the layout does not have or that has another shape in each,
            and for damage; naming tensor and file.
    """
    with CheckpointReader(location) as saved:
        tree = saved.tree(parts)
        names = saved.names_in(tree)
        scalars = [name for name in names if name not in layout.tensors and saved.record(name).shape == ()]
        chosen = None if parts is None else {escape(part) for part in parts}
        wanted = [name for name in layout.tensors if chosen is None or part_of(name) in chosen]
        _fits(saved, layout, names, wanted, scalars)
        try:
            memory, views = wanted_buffers(layout, place, wanted, {name: saved.record(name).dtype for name in wanted})
        except LayoutError as error:
            raise CheckpointError(f"{saved.location}: {error}") from None
        for name in scalars:
            memory[name] = torch.empty((), dtype=DTYPES[saved.record(name).dtype])
            views[name] = [(Region((), ()), memory[name])]
        read_views(saved, views, verify=verify)
        own = {name: memory.get(name, views[name][0][1] if name in views else None) for name in names}
        return Part(
            put_together(tree, own.__getitem__), {name: memory[name] for name in layout.buffers if name in memory}
        )


def _fits(
    saved: CheckpointReader, layout: Layout, names: Collection[str], wanted: Collection[str], scalars: Collection[str]
) -> None:
    for name in wanted:
        if name not in names:
            raise CheckpointError(f"{saved.location}: holds no tensor {name!r}, which the layout wants")
        shape, held = saved.record(name).shape, layout.tensors[name]
        if shape != held.shape:
            raise CheckpointError(
                f"{saved.location}: tensor {name!r} has shape {list(shape)}, but the layout wants {list(held.shape)}: "
                "is this the checkpoint of another model?"
            )
    for name in names:
        if name not in layout.tensors and name not in scalars:
            raise CheckpointError(
                f"{saved.location}: holds tensor {name!r}, which is not in the layout: add it there, or load only the "
                "parts that you need"
            )


def put_into(
    location: Location, tree: Mapping[str, Any], layout: Layout, place: Place, *, verify: bool = True
) -> State:
    """A tree like the given one with the values of a checkpoint: DTensors of the same mesh and placements.

    Args:
        location: of one step.
        tree: of tensors and JSON values, as it would be saved; its values do not matter.
        layout: of all ranks' tensors, by their names in the tree.
        place: this rank's.
        verify: compare checksums.

    Raises:
        CheckpointError: where the checkpoint has no such place, another shape, or is damaged.
    """
    apart = take_apart(tree)
    with CheckpointReader(location) as saved:
        saved_name: dict[str, str] = {}
        values = _matched(saved, apart.json, saved.tree(), (), saved_name)
        own: dict[str, Tensor] = {}
        views: dict[str, list[tuple[Region, Tensor]]] = {}
        for name, tensor in apart.tensors.items():
            record = saved.record(saved_name[name])
            if isinstance(tensor, Deferred) or record.shape != tuple(tensor.shape):
                raise CheckpointError(
                    f"{saved.location}: tensor {name!r} has shape {list(record.shape)}, but {list(tensor.shape)} is "
                    "wanted: is this the checkpoint of another model?"
                )
            local = local_part(tensor)
            own[name] = torch.empty(local.shape, dtype=DTYPES[record.dtype])
            held, row = layout.tensors[name], layout.row(place)
            for number in np.flatnonzero(held.places == row).tolist():
                views.setdefault(saved_name[name], []).append((held.boxes.region(number), own[name]))
        read_views(saved, views, verify=verify)
    filled = {name: _as(apart.tensors[name], local) for name, local in own.items()}
    state: State = put_together(values, filled.__getitem__)
    return state


def _matched(saved: CheckpointReader, node: Any, there: Any, path: tuple[str, ...], names: dict[str, str]) -> Json:
    """The wanted tree with the checkpoint's values; tensors of the one by the names of the other."""
    where = "/".join(path)
    if isinstance(node, dict) and len(node) == 1 and "$tensor" in node:
        if not (isinstance(there, dict) and len(there) == 1 and "$tensor" in there):
            raise CheckpointError(f"{saved.location}: has no tensor at {where!r}, where one is wanted")
        if names.setdefault(node["$tensor"], there["$tensor"]) != there["$tensor"]:
            raise CheckpointError(
                f"{saved.location}: {where!r} and {node['$tensor']!r} are one tensor here, but two in the checkpoint"
            )
        return node
    if isinstance(node, dict) and isinstance(there, dict) and "$float" not in node:
        for key in node:
            if key not in there:
                raise CheckpointError(f"{saved.location}: has no {'/'.join((*path, key))!r}, which is wanted")
        return {key: _matched(saved, item, there[key], (*path, key), names) for key, item in node.items()}
    if isinstance(node, list) and isinstance(there, list):
        if len(node) != len(there):
            raise CheckpointError(
                f"{saved.location}: a list of {len(node)} at {where!r} is wanted, and it has {len(there)} items"
            )
        return [
            _matched(saved, item, other, (*path, str(number)), names)
            for number, (item, other) in enumerate(zip(node, there, strict=True))
        ]
    return there  # type: ignore[no-any-return]


def _as(like: Any, local: Tensor) -> Tensor:
    if not is_dtensor(like):
        return local.to(like.device)
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        local.to(like.to_local().device),
        like.device_mesh,
        like.placements,
        run_check=False,
        shape=like.shape,
        stride=like.stride(),
    )
