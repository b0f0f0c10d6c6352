"""How ranks write one checkpoint together: each its pieces, then one of them the index, and the commit."""

from __future__ import annotations

import errno
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, TypeVar

from resilin.checkpoint.coordinator import Coordinator, together
from resilin.checkpoint.dtensor import DTensorLayouts, is_dtensor, local_part
from resilin.checkpoint.errors import CheckpointError
from resilin.checkpoint.index import INDEX_NAME
from resilin.checkpoint.sharded import Buffers, Owned, owned, rank_share
from resilin.checkpoint.share import Piece, Share, whole_share
from resilin.checkpoint.steps import committed_steps, step_name
from resilin.checkpoint.storage import Root
from resilin.checkpoint.store import SavedCheckpoint
from resilin.checkpoint.tensor_write import host_bytes
from resilin.checkpoint.tree import take_apart
from resilin.checkpoint.write import assemble, write_files, write_index
from resilin.layout import Layout, LayoutError, Region, rank

T = TypeVar("T")
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def _size(count: float) -> str:
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}" if unit != "bytes" else f"{count:.0f} bytes"
        count /= 1000
    return f"{count:.3g} TB"


class Saver:
    """The ranks' side of `CheckpointFolder.save`, in two halves: what each writes, and writing it.

    Args:
        root: where checkpoints are kept.
        coordinator: of the ranks.
        layouts: what DTensors say of themselves.
        second_copy: whether to write each index twice.
    """

    def __init__(self, root: Root, coordinator: Coordinator, layouts: DTensorLayouts, *, second_copy: bool) -> None:
        self._root, self._coordinator, self._layouts = root, coordinator, layouts
        self._second_copy = second_copy
        self._writes: tuple[Layout, list[Owned]] | None = None

    def prepare(
        self, tree: Mapping[str, Any], layout: Layout | None, buffers: Buffers | None, copy: Callable[[Share], Share]
    ) -> Share:
        """What this rank will write.

        Args:
            tree: this rank's.
            layout: of all ranks; None: the DTensors say it.
            buffers: named ones of the layout.
            copy: gives what `prepare` gives: the same, or the same over copies.

        Raises:
            CheckpointError: for what cannot be saved, by name; at all ranks, where one of them fails.
        """
        # Each part is agreed on, so that ranks never wait for one that refused its own state.
        apart = self._agreed(lambda: take_apart(tree, separate=() if layout is None else layout.tensors.keys()))
        if layout is None:
            if self._coordinator.world == 1 and not any(map(is_dtensor, apart.tensors.values())):
                return copy(whole_share(apart))
            layout = self._layouts.of(apart.tensors)
            apart = replace(apart, tensors={name: local_part(tensor) for name, tensor in apart.tensors.items()})
        known, place = layout, rank(self._coordinator.rank)
        return self._agreed(lambda: copy(rank_share(apart, known, place, buffers, self._owned(known))))

    def _owned(self, layout: Layout) -> list[Owned]:
        if self._writes is None or self._writes[0] is not layout:
            try:
                self._writes = layout, owned(layout, rank(self._coordinator.rank))
            except LayoutError as error:
                raise CheckpointError(f"{self._root.location}: the layout of this save is wrong: {error}") from None
        return self._writes[1]

    def _agreed(self, make: Callable[[], T]) -> T:
        """What `make` gives, once it succeeded at every rank."""
        made: list[T] = []
        together(self._coordinator, lambda: made.append(make()), lambda _: None)
        return made[0]

    def write(
        self, step: int, share: Share, lock: Callable[[], None], prune: Callable[[], tuple[int, ...]]
    ) -> SavedCheckpoint:
        """Write and commit.

        Args:
            step: steps committed.
            share: what `prepare` gave.
            lock: makes this the only run that saves here; called at rank 0 before anything is written.
            prune: removes old checkpoints; called at rank 0 after the commit.

        Raises:
            CheckpointError: at every rank, where any of them failed; nothing was committed.
        """
        started = time.perf_counter()
        name, coordinator = step_name(step), self._coordinator
        locked = False

        def begin(shares: list[dict[str, Any]]) -> dict[str, Any]:
            nonlocal locked
            agreed = self._agree(step, shares)
            lock()
            locked = True
            return agreed | self._begin(step)

        try:
            begun = self._guarded(step, share, lambda: _declare(share), begin)
            suffix = f"-{coordinator.rank + 1:05d}-of-{coordinator.world:05d}" if coordinator.world > 1 else ""
            pieces = [*share.pieces, *_scalars(share, begun["writers"], coordinator.rank)]
            folder, earlier = self._root.draft(name), begun["earlier"]

            def mine() -> dict[str, Any]:
                before = None if earlier is None else self._root.at(step_name(earlier))
                return write_files(folder, pieces, suffix + begun["suffix"], before) | {"tree": share.tree}

            def conclude(written: list[dict[str, Any]]) -> dict[str, Any]:
                size = self._conclude(step, written)
                return {"bytes": size, "pruned": list(prune())}

            done = self._guarded(step, share, mine, conclude)
        except BaseException:
            if locked:  # otherwise the draft may be another process's
                self._root.abort(name)
            raise
        seconds = time.perf_counter() - started
        return SavedCheckpoint(
            step, self._root.at(step_name(step)).location, done["bytes"], seconds, tuple(done["pruned"])
        )

    def _guarded(self, step: int, share: Share, mine: Any, lead: Any) -> Any:
        """One phase of a save, whose system errors are told in words."""

        def worded(part: Any) -> Any:
            def call(*given: Any) -> Any:
                try:
                    return part(*given)
                except OSError as error:
                    raise CheckpointError(self._failure(step, share, error)) from error

            return call

        return together(self._coordinator, worded(mine), worded(lead))

    def _agree(self, step: int, shares: list[dict[str, Any]]) -> dict[str, Any]:
        digests = {share["digest"] for share in shares}
        if len(digests) > 1:
            raise CheckpointError(
                f"{self._root.location}: the ranks that save step {step} do not agree on the layout: each must give "
                "the same, of all ranks and all tensors"
            )
        writers: dict[str, int] = {}
        values: dict[str, tuple[int, str]] = {}
        for number, share in enumerate(shares):
            for name, value in share["scalars"].items():
                before = values.setdefault(name, (number, value))
                if before[1] != value:
                    raise CheckpointError(
                        f"tensor {name!r} has no dimensions, so every rank must have the same value; ranks {before[0]} "
                        f"and {number} have different ones"
                    )
                if name in share["unlisted"]:
                    writers.setdefault(name, number)
        return {"writers": writers}

    def _begin(self, step: int) -> dict[str, Any]:
        self._root.clean()
        suffix = self._root.begin(step_name(step))
        others = [other for other in committed_steps(self._root) if other != step]
        return {"suffix": suffix, "earlier": others[-1] if others else None}

    def _conclude(self, step: int, written: list[dict[str, Any]]) -> int:
        index = assemble(step, [part["tree"] for part in written], written)
        size = write_index(self._root.draft(step_name(step)), index, second_copy=self._second_copy)
        self._root.commit(step_name(step))
        return size

    def _failure(self, step: int, share: Share, error: OSError) -> str:
        replaced = INDEX_NAME in self._root.at(step_name(step)).names()
        good = [other for other in committed_steps(self._root) if other != step or replaced]
        still = f"the checkpoint of step {good[-1]} is still good" if good else "there is no earlier checkpoint"
        if error.errno not in _FULL:
            if error.errno == errno.ENOENT and self._coordinator.rank:
                still += "; is this a folder that all ranks share?"
            return f"{self._root.location}: the checkpoint of step {step} could not be saved ({error}); {still}"
        free = self._root.free()
        left = f" and {_size(free)} are free" if free is not None else ""
        return (
            f"{self._root.location}: the disk is full: the checkpoint of step {step} needs {_size(share.bytes)}{left} "
            f"({error.strerror}); {still}. Free some space, or keep fewer checkpoints, and resume"
        )


def _declare(share: Share) -> dict[str, Any]:
    share.ready()
    scalars = {name: f"{tensor.dtype} {bytes(host_bytes(tensor)).hex()}" for name, tensor in share.scalars.items()}
    return {"digest": share.digest, "scalars": scalars, "unlisted": sorted(share.unlisted)}


def _scalars(share: Share, writers: Mapping[str, int], number: int) -> list[Piece]:
    """The 0-d tensors that no layout lists, at the rank that was chosen to write them."""
    return [
        Piece(name, tensor.dtype, (), Region((), ()), tensor.clone)
        for name, tensor in share.scalars.items()
        if writers.get(name) == number
    ]
