"""Resilin's own checkpoints as one of the formats; everything that uses their reader and writer is in this file."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from resilin.checkpoint.errors import CheckpointError
from resilin.checkpoint.folder import CheckpointFolder
from resilin.checkpoint.foreign.shards import LayoutBuilder, Slice
from resilin.checkpoint.foreign.stored import FILES, MODEL, OPTIMIZER, OTHER, Stored, moment, weight
from resilin.checkpoint.index import INDEX_NAME
from resilin.checkpoint.inspect import find_checkpoint
from resilin.checkpoint.reader import CheckpointReader
from resilin.checkpoint.tensor_record import DTYPES
from resilin.checkpoint.tree import escape, put_together
from resilin.layout import Place, file
from resilin.nouns import Deferred

TITLE = "Resilin checkpoint"


def is_resilin(folder: Path) -> bool:
    """Whether a folder is a checkpoint of Resilin, or holds checkpoints by step."""
    return (folder / INDEX_NAME).is_file() or any(
        any(folder.glob(f"{inner}step-*/{INDEX_NAME}")) for inner in ("", "checkpoints/")
    )


class _Saved:
    """Tensors of a checkpoint, each a place's buffer; checksums are compared when one is read."""

    def __init__(self, reader: CheckpointReader) -> None:
        self.reader = reader
        self.builder = LayoutBuilder()
        self.ties: dict[str, str] = {}
        self._names: dict[str, str] = {}

    def keep(self, name: str, saved: str) -> None:
        """A tensor of the checkpoint under a name of `Stored`; the second name of one is a tie."""
        first = self._names.setdefault(saved, name)
        if first != name:
            self.ties[name] = first
            return
        record = self.reader.record(saved)
        if record.dtype == "F4":
            raise CheckpointError(f"{self.reader.location}: tensor {saved!r} is F4, which other formats do not have")
        self.builder.tensor(name, record.shape, record.dtype)
        self.builder.shard(name, file(str(self.reader.location)), saved, Slice.whole(record.shape), 0)

    def read(self, place: Place, buffer: str) -> Tensor:
        """A whole tensor as a row."""
        return self.reader.tensor(buffer, mapped=True).reshape(-1)


def read_resilin(location: Path) -> Stored:
    """Open a checkpoint of Resilin: one step's folder, or the newest of a run. Checksums are compared as it is read.

    Raises:
        CheckpointError: it is damaged.
    """
    reader = CheckpointReader(find_checkpoint(location))
    saved = _Saved(reader)
    marks = reader.tree()
    reader.names_in(marks)
    tree: dict[str, Any] = put_together(marks, _Mark)
    optimizer = tree.pop("optimizer", {})
    known = set(
        optimizer.get("parameters", {})
    )  # of two names of a tied weight, the optimizer knows one: it comes first
    frozen = frozenset(tree["frozen"]) if "frozen" in tree else None
    for part in ("model", "frozen"):
        for name, mark in sorted(tree.pop(part, {}).items(), key=lambda item: item[0] not in known):
            saved.keep(weight(name), _named(mark, f"{part}/{name}"))
    for name, moments in optimizer.pop("parameters", {}).items():
        for state, mark in moments.items():
            saved.keep(moment(state, name), _named(mark, f"optimizer/parameters/{name}/{state}"))
    groups = optimizer.pop("groups", [])
    for name, mark in tree.pop("files", {}).items():
        saved.keep(FILES + name, _named(mark, f"files/{name}"))
    if optimizer:
        tree["optimizer"] = optimizer
    other = _marked(saved, tree, ())
    layout = saved.builder.layout(location)
    if frozen is None and "run" in other:  # a run's own checkpoint has that part where anything is frozen
        frozen = frozenset()
    return Stored(TITLE, layout, saved.read, reader.index.step, groups, other, saved.ties, frozen=frozen)


class _Mark(str):
    """The name of a tensor in a checkpoint's tree."""

    __slots__ = ()


def _named(value: object, where: str) -> str:
    if not isinstance(value, _Mark):
        raise CheckpointError(f"{where!r} is a {type(value).__name__}, not a tensor: nothing else has a place there")
    return value


def _marked(saved: _Saved, node: Any, path: tuple[str, ...]) -> Any:
    if isinstance(node, _Mark):
        name = OTHER + "/".join(escape(key) for key in path)
        saved.keep(name, node)
        return {"$tensor": saved.ties.get(name, name)}
    if isinstance(node, dict):
        return {key: _marked(saved, item, (*path, key)) for key, item in node.items()}
    if isinstance(node, list):
        return [_marked(saved, item, (*path, str(number))) for number, item in enumerate(node)]
    return node


def write_resilin(stored: Stored, target: Path) -> int:
    """Write a checkpoint of the step that `stored` is of, into a folder of checkpoints, a tensor at a time.

    Returns:
        Bytes written.

    Raises:
        CheckpointError: it cannot be written, or a value would take the place of the model or optimizer.
    """
    late = {
        name: Deferred(DTYPES[held.dtype], held.shape, partial(stored.tensor, name))
        for name in stored.names
        for held in [stored.holdings(name)]
    }
    for alias, name in stored.ties.items():
        late[alias] = late[name]
    model, frozen = _under(late, MODEL), set(stored.frozen or ())
    frozen |= {alias.removeprefix(MODEL) for alias, name in stored.ties.items() if name.removeprefix(MODEL) in frozen}
    tree: dict[str, Any] = {"model": {name: one for name, one in model.items() if name not in frozen}}
    if frozen:
        tree["frozen"] = {name: one for name, one in model.items() if name in frozen}
    parameters: dict[str, dict[str, Deferred]] = {}
    for name, tensor in _under(late, OPTIMIZER).items():
        state, _, parameter = name.partition("/")
        parameters.setdefault(parameter, {})[state] = tensor
    other = put_together(stored.other, late.__getitem__)
    optimizer = {"parameters": parameters, **({"groups": stored.groups} if stored.groups else {})}
    if parameters or stored.groups or "optimizer" in other:
        tree["optimizer"] = {**optimizer, **other.pop("optimizer", {})}
    files = _under(late, FILES)
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


def _under(tensors: dict[str, Deferred], prefix: str) -> dict[str, Deferred]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
