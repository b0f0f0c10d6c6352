"""A checkpoint of any layout as one that a single process would have written: one piece for each tensor."""

from __future__ import annotations

from collections.abc import Collection
from functools import partial
from typing import Any

from resilin.checkpoint.folder import CheckpointFolder
from resilin.checkpoint.reader import CheckpointReader
from resilin.checkpoint.storage import Location
from resilin.checkpoint.store import SavedCheckpoint
from resilin.checkpoint.tensor_record import DTYPES
from resilin.checkpoint.tree import put_together
from resilin.nouns import Deferred, State


def deferred_tree(saved: CheckpointReader, parts: Collection[str] | None = None, *, verify: bool = True) -> State:
    """The state of a checkpoint, each tensor read only when it is its turn to be written.

    Args:
        saved: the checkpoint; it must stay open until the state was saved.
        parts: only these top-level keys.
        verify: compare checksums.
    """
    tree = saved.tree(parts)
    late = {
        name: Deferred(
            DTYPES[saved.record(name).dtype], saved.record(name).shape, partial(saved.tensor, name, verify=verify)
        )
        for name in saved.names_in(tree)
    }
    state: State = put_together(tree, late.__getitem__)
    return state


def consolidate(source: Location, target: Location) -> SavedCheckpoint:
    """Write a checkpoint anew as `model.safetensors`, `optimizer.safetensors`, ..., one tensor in memory at a time.

    The bytes depend on the state alone, not on the layout that wrote the source: keys of the tree are put in
    alphabetical order, the one thing that ranks which each know a part of the state cannot agree on.

    Args:
        source: of one step.
        target: a folder (or URL) of checkpoints; the new one lies there under its step.

    Raises:
        CheckpointError: the source is damaged, naming file and tensor, or the target cannot be written.
    """
    folder = CheckpointFolder(target)
    try:
        with CheckpointReader(source) as saved:
            return folder.save(saved.index.step, _ordered(deferred_tree(saved)))
    finally:
        folder.close()


def _ordered(node: Any) -> Any:
    if isinstance(node, dict):
        return {key: _ordered(node[key]) for key in sorted(node)}
    return [_ordered(item) for item in node] if isinstance(node, list) else node
