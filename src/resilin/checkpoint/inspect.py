"""What a checkpoint holds, without reading its tensors."""

from __future__ import annotations

import math
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from resilin.checkpoint.errors import CheckpointError
from resilin.checkpoint.folder import CheckpointFolder
from resilin.checkpoint.index import INDEX_NAME, Index
from resilin.checkpoint.read import quick_check
from resilin.checkpoint.storage import Location, as_location, folder_at
from resilin.checkpoint.tensor_record import shape_in_file
from resilin.checkpoint.tree import Json, escape
from resilin.checkpoint.verify import verify_checkpoint


@dataclass(frozen=True)
class TensorLine:
    """One stored tensor.

    Attributes:
        name: its place in the tree, keys joined by `/`.
        dtype: as safetensors writes it ("F32").
        shape: of the whole tensor.
        bytes: of its data.
        shared: further places that hold this same tensor (tied weights).
        pieces: that it lies in: more than one where several ranks wrote it.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    bytes: int
    shared: tuple[str, ...]
    pieces: int = 1


@dataclass(frozen=True)
class PartLine:
    """One top-level key of the tree.

    Attributes:
        name: the key.
        tensors: how many it holds, tied ones once.
        numbers: elements of all of them.
        bytes: of their data.
        values: how many JSON values it holds.
    """

    name: str
    tensors: int
    numbers: int
    bytes: int
    values: int


@dataclass(frozen=True)
class Description:
    """A checkpoint without its tensors' values.

    Attributes:
        path: its folder, or URL.
        step: steps committed.
        bytes: of all its tensor files.
        files: how many these are.
        saved_at: when it was completed, seconds since 1970.
        parts: by top-level key.
        tensors: every stored tensor.
        values: every JSON value by its place in the tree; empty dicts and lists too.
    """

    path: Any
    step: int
    bytes: int
    files: int
    saved_at: float
    parts: tuple[PartLine, ...]
    tensors: tuple[TensorLine, ...]
    values: dict[str, Json]


@dataclass(frozen=True)
class CheckpointLine:
    """One checkpoint of a folder of them; `problem` says why it cannot be loaded, or is None."""

    step: int
    path: Any
    bytes: int
    problem: str | None


def folder_of(path: Location) -> CheckpointFolder:
    """The checkpoints of a run folder, or of a folder or URL of checkpoints.

    Raises:
        CheckpointError: the place cannot be used.
    """
    at = as_location(path)
    if isinstance(at, Path):
        elsewhere = _named_place(at / "settings.toml")
        if elsewhere:
            return CheckpointFolder(elsewhere)
        if (at / "checkpoints").is_dir():
            at = at / "checkpoints"
    return CheckpointFolder(at)


def _named_place(settings: Path) -> str:
    """Where the settings of a run say that checkpoints are; empty: they do not. All else in them is not looked at."""
    try:
        return str(tomllib.loads(settings.read_text(encoding="utf-8")).get("checkpoint", {}).get("path", ""))
    except (OSError, ValueError):
        return ""


def find_checkpoint(path: Location, step: int | None = None, *, whole: bool = True) -> Any:
    """Where one checkpoint is: a path, or a URL.

    Args:
        path: that folder itself, a folder of checkpoints, or a run folder; or the URL of one of these.
        step: which of several; None: the newest.
        whole: only those that are whole count; a newer one that is not is warned of.

    Raises:
        CheckpointError: when there is none, naming those there are.
    """
    path = as_location(path)
    if step is None and INDEX_NAME in folder_at(path).names():
        return path
    folder = folder_of(path)
    if step is None:
        step = folder.latest() if whole else max([*folder.steps(), *folder.damaged()], default=None)
        if step is None:
            there = not isinstance(path, Path) or path.exists()
            why = "there is no checkpoint that can be loaded" if there else "no such folder"
            raise CheckpointError(f"{path}: {why}")
    elif step not in folder.steps() and (whole or step not in folder.damaged()):
        have = ", ".join(map(str, folder.steps())) or "none"
        why = folder.damaged().get(step, f"steps here: {have}")
        raise CheckpointError(f"{folder.path}: there is no checkpoint of step {step} that can be loaded; {why}")
    return folder.step_path(step)


def list_checkpoints(path: Location) -> list[CheckpointLine]:
    """Every checkpoint of a run folder or a folder of checkpoints, ascending, damaged ones with the reason."""
    folder = folder_of(path)
    damaged = folder.damaged()
    lines = []
    for step in sorted({*folder.steps(), *damaged}):
        at = folder.step_path(step)
        files = folder_at(at)
        lines.append(CheckpointLine(step, at, sum(map(files.size, files.names())), damaged.get(step)))
    return lines


def leaves(node: Json, path: tuple[str, ...]) -> Iterator[tuple[str, str | None, Json]]:
    """Place, the name of the tensor there (or None), and the value."""
    where = "/".join(path)
    if isinstance(node, dict) and len(node) == 1 and "$tensor" in node:
        yield where, str(node["$tensor"]), None
    elif isinstance(node, dict) and len(node) == 1 and "$float" in node:
        yield where, None, str(node["$float"])
    elif isinstance(node, dict) and node:
        for key, item in node.items():
            yield from leaves(item, (*path, escape(key[1:] if key.startswith("$") else key)))
    elif isinstance(node, list) and node:
        for number, item in enumerate(node):
            yield from leaves(item, (*path, str(number)))
    else:
        yield where, None, node


def _describe(path: Any, index: Index) -> Description:
    places: dict[str, list[str]] = {name: [] for name in index.tensors}
    values: dict[str, Json] = {}
    for where, tensor, value in leaves(index.tree, ()):
        if tensor is None:
            values[where] = value
        elif tensor in places:
            places[tensor].append(where)
    tensors = tuple(
        TensorLine(
            name,
            record.dtype,
            shape_in_file(record.dtype, record.shape),
            record.bytes,
            tuple(place for place in places[name] if place != name),
            len(record),
        )
        for name, record in index.tensors.items()
    )
    parts = []
    for key in index.tree if isinstance(index.tree, dict) else ():
        name = key[1:] if key.startswith("$") else key
        inside = [line for line in tensors if line.name == escape(name) or line.name.startswith(escape(name) + "/")]
        count = sum(1 for where in values if where == escape(name) or where.startswith(escape(name) + "/"))
        numbers = sum(math.prod(line.shape) for line in inside)
        parts.append(PartLine(name, len(inside), numbers, sum(line.bytes for line in inside), count))
    saved_at = folder_at(path).modified(INDEX_NAME)
    return Description(path, index.step, index.bytes, len(index.files), saved_at, tuple(parts), tensors, values)


def describe(path: Location, step: int | None = None) -> Description:
    """What is in a checkpoint: parts, tensors, values; no tensor is read.

    Args:
        path: a checkpoint, a folder of checkpoints, or a run folder.
        step: which of several; None: the newest.

    Raises:
        CheckpointError: when there is none, or it is not whole.
    """
    at = find_checkpoint(path, step)
    return _describe(at, quick_check(folder_at(at)))


def verify(path: Location, step: int | None = None) -> Description:
    """Read every byte of a checkpoint and compare every checksum.

    Returns:
        What is in it.

    Raises:
        CheckpointError: for the first thing that is wrong, naming file and tensor.
    """
    at = find_checkpoint(path, step)
    return _describe(at, verify_checkpoint(at))
