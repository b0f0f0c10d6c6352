"""A run's checkpoints, one folder (or prefix of an object store) a step: `step-00000100/` with its files.

A save writes into a temporary name, each file brought to disk, the index last, and then commits. Whatever interrupts
it, what is called `step-*` and has an index is whole; leftovers go with the next save.
"""

from __future__ import annotations

import errno
import re
import time
import warnings
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import torch

from resilin.checkpoint.coordinator import Alone, Coordinator, together
from resilin.checkpoint.dtensor import DTensorLayouts, is_dtensor, local_part
from resilin.checkpoint.errors import CheckpointError, DamagedError
from resilin.checkpoint.index import INDEX_NAME, read_index
from resilin.checkpoint.load import Part, load_part, put_into
from resilin.checkpoint.read import load_checkpoint, quick_check
from resilin.checkpoint.retention import superfluous
from resilin.checkpoint.sharded import Buffers, Owned, owned, rank_share
from resilin.checkpoint.share import Piece, Share, whole_share
from resilin.checkpoint.storage import Location, root_at
from resilin.checkpoint.store import SavedCheckpoint
from resilin.checkpoint.tensor_write import host_bytes
from resilin.checkpoint.tree import take_apart
from resilin.checkpoint.write import assemble, write_files, write_index
from resilin.layout import Layout, LayoutError, Region, rank
from resilin.nouns import State

T = TypeVar("T")
_STEP = re.compile(r"step-(\d{8,})")
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def step_name(step: int) -> str:
    """The folder name of a step."""
    return f"step-{step:08d}"


def _size(count: float) -> str:
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}" if unit != "bytes" else f"{count:.0f} bytes"
        count /= 1000
    return f"{count:.3g} TB"


class CheckpointFolder:
    """A `CheckpointStore` in one place, written by one run at a time: by one process, or by all its ranks together.

    Args:
        path: a folder, made at the first save; or a URL that fsspec knows.
        keep_last: how many of the newest checkpoints to keep; 0: all.
        keep_every: checkpoints of steps divisible by this are kept besides; 0: none.
        second_copy: whether to write each index twice, so that damage to one of them loses nothing.
        coordinator: of the ranks that save together; every rank then makes the same calls of `save`.
    """

    def __init__(
        self,
        path: Location,
        keep_last: int = 0,
        keep_every: int = 0,
        *,
        second_copy: bool = False,
        coordinator: Coordinator | None = None,
    ) -> None:
        if keep_last < 0 or keep_every < 0:
            raise ValueError(f"keep_last ({keep_last}) and keep_every ({keep_every}) cannot be negative")
        try:
            self._root = root_at(path)
        except OSError as error:
            raise CheckpointError(f"{path}: checkpoints cannot be kept here: {error.strerror or error}") from error
        self.path = self._root.location
        self.keep_last = keep_last
        self.keep_every = keep_every
        self.second_copy = second_copy
        self.coordinator: Coordinator = coordinator or Alone()
        self._layouts = DTensorLayouts(self.coordinator)
        self._writes: tuple[Layout, list[Owned]] | None = None
        self._locked = False

    def lock(self) -> None:
        """Make this process the only one that may save here, until `close` or its end; `save` does so by itself.

        Raises:
            CheckpointError: when another process is, or the folder cannot be made.
        """
        if self._locked:
            return
        try:
            self._root.lock()
        except OSError as error:
            raise CheckpointError(f"{self.path}: checkpoints cannot be kept here: {error.strerror or error}") from error
        self._locked = True

    def close(self) -> None:
        """Let other processes save here."""
        if self._locked:
            self._root.unlock()
            self._locked = False

    def step_path(self, step: int) -> Any:
        """Where a step's checkpoint is, whether or not it exists: a path, or a URL."""
        return self._root.at(step_name(step)).location

    def _names(self) -> list[int]:
        try:
            names = self._root.names()
        except OSError as error:
            raise CheckpointError(f"{self.path}: cannot be listed: {error.strerror or error}") from error
        return sorted(int(match[1]) for match in map(_STEP.fullmatch, names) if match)

    def steps(self) -> list[int]:
        """The steps whose checkpoints are whole (index readable, every file present with its size), ascending."""
        damaged = self.damaged()
        return [step for step in self._names() if step not in damaged]

    def damaged(self) -> dict[int, str]:
        """The steps whose folders are there but not whole, and what is wrong with each."""
        wrong = {}
        for step in self._names():
            try:
                quick_check(self._root.at(step_name(step)))
            except CheckpointError as error:
                wrong[step] = str(error)
        return wrong

    def latest(self) -> int | None:
        """The newest step whose checkpoint is whole, or None; warns about newer ones that are not."""
        for step in reversed(self._names()):
            try:
                quick_check(self._root.at(step_name(step)))
                return step
            except CheckpointError as error:
                warnings.warn(f"the checkpoint of step {step} is passed over: {error}", stacklevel=2)
        return None

    # -- loading ------------------------------------------------------------------------------------------------

    def load(
        self,
        step: int,
        device: torch.device | str = "cpu",
        *,
        parts: Collection[str] | None = None,
        mapped: bool = False,
        verify: bool = True,
    ) -> State:
        """The whole tree of a step, in whatever layout it was saved; the options are those of `load_checkpoint`.

        Raises:
            CheckpointError: when there is none, naming those there are; or when it is damaged.
        """
        return self._told(step, partial(load_checkpoint, device=device, parts=parts, mapped=mapped, verify=verify))

    def load_part(
        self, step: int, layout: Layout, *, parts: Collection[str] | None = None, verify: bool = True
    ) -> Part:
        """This rank's part of a step in any layout; see `resilin.checkpoint.load.load_part`.

        Raises:
            CheckpointError: when there is no such step, it is damaged, or does not fit the layout.
        """
        place = rank(self.coordinator.rank)
        return self._told(step, lambda path: load_part(path, layout, place, parts=parts, verify=verify))

    def load_like(self, step: int, tree: Mapping[str, Any], *, verify: bool = True) -> State:
        """A tree like the given one, with the values of a step: DTensors as DTensors, plain tensors whole.

        Each rank reads the byte ranges of its own shards. Every rank calls it.

        Args:
            step: which checkpoint.
            tree: of tensors, as it would be saved; only shapes, meshes and placements matter. What it does not have is
                not read.
            verify: compare checksums.

        Raises:
            CheckpointError: when there is no such step, it is damaged, or does not fit, naming the tensor.
        """
        apart = take_apart(tree)
        layout = self._layouts.of(apart.tensors)
        return self._told(step, lambda path: put_into(path, tree, layout, rank(self.coordinator.rank), verify=verify))

    def _told(self, step: int, load: Callable[[Location], T]) -> T:
        """What `load` gives; its errors say what else there is."""
        path = self.step_path(step)
        if step not in self._names():
            have = ", ".join(map(str, self.steps())) or "none"
            raise CheckpointError(f"{self.path}: there is no checkpoint of step {step}; steps here: {have}")
        try:
            return load(path)
        except DamagedError as error:
            others = [str(other) for other in self.steps() if other != step]
            hint = f"; checkpoints of other steps here: {', '.join(others)} (move {path} away to go on from the newest)"
            raise DamagedError(f"{error}{hint if others else ''}") from None

    def parts_of(self, step: int, *wanted: str) -> list[str]:
        """Which of these top-level keys the checkpoint of a step holds; none where there is no such checkpoint."""
        tree = read_index(self._root.at(step_name(step))).tree if step in self._names() else None
        return [part for part in wanted if isinstance(tree, dict) and part in tree]

    # -- saving -------------------------------------------------------------------------------------------------

    def save(
        self, step: int, tree: Mapping[str, Any], layout: Layout | None = None, *, buffers: Buffers | None = None
    ) -> SavedCheckpoint:
        """Write a tree and, once it is safe, remove what need not be kept.

        Tensors are written as they are when this is called, and may change as soon as it returns.

        Args:
            step: steps committed; an existing checkpoint of this step is replaced, and lost only when the new one is
                complete.
            tree: dicts with text keys and lists, holding tensors and JSON values (NaN and infinities too). Two
                places that hold the same view of the same memory do so again after loading. Where several ranks save,
                each gives its own part: DTensors, or its buffers and a layout; plain tensors without a layout are
                equal at all ranks that have them.
            layout: which region of which tensor is at which rank (`resilin.layout.rank`); None: the DTensors say so.
            buffers: named buffers of the layout.

        Raises:
            CheckpointError: when the tree holds something else, another process saves here, or the disk is full or
                refuses; earlier checkpoints are untouched, and nothing half-written stays behind.
        """
        return self.write(step, self.prepare(step, tree, layout, buffers=buffers))

    def prepare(
        self, step: int, tree: Mapping[str, Any], layout: Layout | None = None, *, buffers: Buffers | None = None
    ) -> Share:
        """The first half of `save`: what this rank will write. Nothing is copied; `write` is the second half.

        Raises:
            CheckpointError: for what cannot be saved, by name.
        """
        if step < 0:
            raise ValueError(f"step ({step}) cannot be negative")
        # Each part is agreed on, so that ranks never wait for one that refused its own state.
        apart = self._agreed(lambda: take_apart(tree, separate=() if layout is None else layout.tensors.keys()))
        if layout is None:
            if self.coordinator.world == 1 and not any(map(is_dtensor, apart.tensors.values())):
                return whole_share(apart)
            layout = self._layouts.of(apart.tensors)
            apart = replace(apart, tensors={name: local_part(tensor) for name, tensor in apart.tensors.items()})
        known, place = layout, rank(self.coordinator.rank)
        return self._agreed(lambda: rank_share(apart, known, place, buffers, self._owned(known)))

    def _owned(self, layout: Layout) -> list[Owned]:
        if self._writes is None or self._writes[0] is not layout:
            try:
                self._writes = layout, owned(layout, rank(self.coordinator.rank))
            except LayoutError as error:
                raise CheckpointError(f"{self.path}: the layout of this save is wrong: {error}") from None
        return self._writes[1]

    def _agreed(self, make: Callable[[], T]) -> T:
        """What `make` gives, once it succeeded at every rank."""
        made: list[T] = []
        together(self.coordinator, lambda: made.append(make()), lambda _: None)
        return made[0]

    def write(self, step: int, share: Share) -> SavedCheckpoint:
        """The second half of `save`: write and commit, together with the other ranks.

        Raises:
            CheckpointError: as `save` does.
        """
        started = time.perf_counter()
        name, coordinator = step_name(step), self.coordinator
        try:
            begun = self._guarded(step, share, lambda: _declare(share), partial(self._begin, step))
            suffix = f"-{coordinator.rank + 1:05d}-of-{coordinator.world:05d}" if coordinator.world > 1 else ""
            pieces = [*share.pieces, *_scalars(share, begun["writers"], coordinator.rank)]
            folder, earlier = self._root.draft(name), begun["earlier"]

            def mine() -> dict[str, Any]:
                before = None if earlier is None else self._root.at(step_name(earlier))
                return write_files(folder, pieces, suffix + begun["suffix"], before) | {"tree": share.tree}

            done = self._guarded(step, share, mine, partial(self._conclude, step))
        except BaseException:
            if coordinator.rank == 0 and self._locked:  # otherwise the draft may be another process's
                self._root.abort(name)
            raise
        seconds = time.perf_counter() - started
        return SavedCheckpoint(step, self.step_path(step), done["bytes"], seconds, tuple(done["pruned"]))

    def _guarded(self, step: int, share: Share, mine: Any, lead: Any) -> Any:
        """One phase of a save, whose system errors are told in words."""

        def worded(part: Any) -> Any:
            def call(*given: Any) -> Any:
                try:
                    return part(*given)
                except OSError as error:
                    raise CheckpointError(self._failure(step, share, error)) from error

            return call

        return together(self.coordinator, worded(mine), worded(lead))

    def _begin(self, step: int, shares: list[dict[str, Any]]) -> dict[str, Any]:
        digests = {share["digest"] for share in shares}
        if len(digests) > 1:
            raise CheckpointError(
                f"{self.path}: the ranks that save step {step} do not agree on the layout: each must give the same, of "
                "all ranks and all tensors"
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
        self.lock()
        self._root.clean()
        suffix = self._root.begin(step_name(step))
        others = [other for other in self._names() if other != step]
        return {"suffix": suffix, "writers": writers, "earlier": others[-1] if others else None}

    def _conclude(self, step: int, written: list[dict[str, Any]]) -> dict[str, Any]:
        index = assemble(step, [part["tree"] for part in written], written)
        size = write_index(self._root.draft(step_name(step)), index, second_copy=self.second_copy)
        self._root.commit(step_name(step))
        return {"bytes": size, "pruned": list(self.prune(step))}

    def _failure(self, step: int, share: Share, error: OSError) -> str:
        good = [
            other for other in self._names() if other != step or INDEX_NAME in self._root.at(step_name(step)).names()
        ]
        still = f"the checkpoint of step {good[-1]} is still good" if good else "there is no earlier checkpoint"
        if error.errno not in _FULL:
            return f"{self.path}: the checkpoint of step {step} could not be saved ({error}); {still}"
        free = self._root.free()
        left = f" and {_size(free)} are free" if free is not None else ""
        return (
            f"{self.path}: the disk is full: the checkpoint of step {step} needs {_size(share.bytes)}{left} "
            f"({error.strerror}); {still}. Free some space, or keep fewer checkpoints, and resume"
        )

    # -- removing -----------------------------------------------------------------------------------------------

    def drop_after(self, step: int) -> tuple[int, ...]:
        """Remove the checkpoints of later steps, as a run does that goes on from an earlier one.

        Returns:
            Their steps.
        """
        self.lock()
        return self._remove([later for later in self._names() if later > step])

    def prune(self, newest: int | None = None) -> tuple[int, ...]:
        """Remove what `keep_last` and `keep_every` do not keep.

        Args:
            newest: the step that was just saved; None: none was, and damaged checkpoints are left alone.

        Returns:
            The steps removed.
        """
        self.lock()
        return self._remove(self.superfluous(newest))

    def superfluous(self, newest: int | None = None) -> list[int]:
        """What `prune` would remove. Damaged ones count only after a save, whose result is known to be whole."""
        steps = self.steps() if newest is None else self._names()
        return superfluous(steps, self.keep_last, self.keep_every, newest)

    def _remove(self, steps: Collection[int]) -> tuple[int, ...]:
        removed = []
        for step in steps:
            path = self.step_path(step)
            try:
                self._root.remove(step_name(step))
                removed.append(step)
            except OSError as error:
                warnings.warn(f"{path}: an old checkpoint could not be removed ({error})", stacklevel=3)
        return tuple(removed)


def _declare(share: Share) -> dict[str, Any]:
    scalars = {name: f"{tensor.dtype} {bytes(host_bytes(tensor)).hex()}" for name, tensor in share.scalars.items()}
    return {"digest": share.digest, "scalars": scalars, "unlisted": sorted(share.unlisted)}


def _scalars(share: Share, writers: Mapping[str, int], number: int) -> list[Piece]:
    """The 0-d tensors that no layout lists, at the rank that was chosen to write them."""
    return [
        Piece(name, tensor.dtype, (), Region((), ()), partial(torch.clone, tensor))
        for name, tensor in share.scalars.items()
        if writers.get(name) == number
    ]
