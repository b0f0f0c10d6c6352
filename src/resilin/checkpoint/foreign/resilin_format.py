"""Resilin's own checkpoints as one of the formats; everything that uses their reader and writer is in this file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from resilin.checkpoint.errors import CheckpointError
from resilin.checkpoint.folder import CheckpointFolder
from resilin.checkpoint.foreign.buffers import Gathered
from resilin.checkpoint.foreign.stored import FILES, MODEL, OPTIMIZER, Stored, moment, weight
from resilin.checkpoint.index import INDEX_NAME, read_index
from resilin.checkpoint.read import load_checkpoint
from resilin.checkpoint.tree import put_together


def is_resilin(folder: Path) -> bool:
    """Whether a folder is a checkpoint of Resilin, or holds checkpoints by step."""
    return (folder / INDEX_NAME).is_file() or any(folder.glob("step-*/" + INDEX_NAME))


def _newest(folder: Path) -> Path:
    if (folder / INDEX_NAME).is_file():
        return folder
    store = CheckpointFolder(folder)
    step = store.latest()
    if step is None:
        raise CheckpointError(f"{folder}: none of its checkpoints is whole")
    return store.step_path(step)


def read_resilin(folder: Path) -> Stored:
    """Open a checkpoint of Resilin: one step's folder, or the newest of several. Every checksum is compared.

    Raises:
        CheckpointError: it is damaged.
    """
    folder = _newest(folder)
    index = read_index(folder)
    tree = load_checkpoint(folder, mapped=True)
    gathered = Gathered()
    ties: dict[str, str] = {}
    seen: dict[int, str] = {}
    where = str(folder)

    def keep(name: str, tensor: Tensor) -> None:
        if id(tensor) in seen:
            ties[name] = seen[id(tensor)]
            return
        seen[id(tensor)] = name
        gathered.whole(name, where, name, tensor)

    for part in ("model", "frozen"):
        for name, tensor in tree.pop(part, {}).items():
            keep(weight(name), tensor)
    optimizer = tree.pop("optimizer", {})
    for name, moments in optimizer.get("parameters", {}).items():
        for state, tensor in moments.items():
            keep(moment(state, name), tensor)
    groups = optimizer.get("groups", [])
    for name, tensor in tree.pop("files", {}).items():
        keep(FILES + name, tensor)
    rest = {key: value for key, value in optimizer.items() if key not in ("parameters", "groups")}
    other = gathered.marked({**tree, **({"optimizer": rest} if rest else {})}, where)
    layout = gathered.builder.layout(folder)
    return Stored("Resilin checkpoint", layout, gathered.read, index.step, groups, other, ties)


def write_resilin(stored: Stored, target: Path, scratch: Callable[[], Path]) -> int:
    """Write a checkpoint of the step that `stored` is of, into a folder of checkpoints.

    Args:
        stored: what to write.
        target: the folder that will hold `step-.../`.
        scratch: gives a new file name for a tensor that must be put together, so that no more than one is in memory.

    Returns:
        Bytes written.
    """
    tensors: dict[str, Tensor] = {}
    memory: set[int] = set()
    for name in stored.names:
        tensor = stored.tensor(name, scratch())
        # One number that belongs to many parameters (their step) is not to be saved as a tied weight.
        tensors[name] = tensor.clone() if tensor.numel() and tensor.data_ptr() in memory else tensor
        memory.add(tensors[name].data_ptr())
    for alias, name in stored.ties.items():
        tensors[alias] = tensors[name]
    tree: dict[str, Any] = {"model": _under(tensors, MODEL)}
    parameters: dict[str, dict[str, Tensor]] = {}
    for name, tensor in _under(tensors, OPTIMIZER).items():
        state, _, parameter = name.partition("/")
        parameters.setdefault(parameter, {})[state] = tensor
    other = put_together(stored.other, tensors.__getitem__)
    optimizer = {"parameters": parameters, **({"groups": stored.groups} if stored.groups else {})}
    if parameters or stored.groups or "optimizer" in other:
        tree["optimizer"] = {**optimizer, **other.pop("optimizer", {})}
    files = _under(tensors, FILES)
    if files:
        tree["files"] = files
    taken = sorted(set(tree) & set(other))
    if taken:
        raise CheckpointError(f"'other/{taken[0]}' would take the place of the checkpoint's own {taken[0]!r}")
    store = CheckpointFolder(target)
    try:
        return store.save(stored.step or 0, {**tree, **other}).bytes
    finally:
        store.close()


def _under(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
