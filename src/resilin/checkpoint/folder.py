"""A run's checkpoints, one folder (or prefix of an object store) a step: `step-00000100/` with its files.

A save writes into a temporary name, each file brought to disk, the index last, and then commits. Whatever interrupts
it, what is called `step-*` and has an index is whole; leftovers go with the next save.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import Any, TypeVar

import torch

from resilin.checkpoint.coordinator import Alone, Coordinator
from resilin.checkpoint.dtensor import DTensorLayouts
from resilin.checkpoint.errors import CheckpointError, DamagedError
from resilin.checkpoint.index import read_index
from resilin.checkpoint.load import Part, load_part, put_into
from resilin.checkpoint.read import load_checkpoint, quick_check
from resilin.checkpoint.retention import superfluous
from resilin.checkpoint.save import Saver
from resilin.checkpoint.sharded import Buffers
from resilin.checkpoint.share import Share
from resilin.checkpoint.steps import committed_steps, step_name
from resilin.checkpoint.storage import Location, root_at
from resilin.checkpoint.store import SavedCheckpoint
from resilin.checkpoint.tree import take_apart
from resilin.layout import Layout, rank
from resilin.nouns import State

T = TypeVar("T")


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
        self.coordinator: Coordinator = coordinator or Alone()
        self._layouts = DTensorLayouts(self.coordinator)
        self._saver = Saver(self._root, self.coordinator, self._layouts, second_copy=second_copy)
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
        return committed_steps(self._root)

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
        self,
        step: int,
        tree: Mapping[str, Any],
        layout: Layout | None = None,
        *,
        buffers: Buffers | None = None,
        copy: Callable[[Share], Share] = lambda share: share,
    ) -> Share:
        """The first half of `save`: what this rank will write; `write` is the second half.

        Args:
            step: as for `save`.
            tree: as for `save`.
            layout: as for `save`.
            buffers: as for `save`.
            copy: what to make of it; so as it is, it shares the memory of the tree.

        Raises:
            CheckpointError: for what cannot be saved, by name; at all ranks, where one of them fails.
        """
        if step < 0:
            raise ValueError(f"step ({step}) cannot be negative")
        return self._saver.prepare(tree, layout, buffers, copy)

    def write(self, step: int, share: Share) -> SavedCheckpoint:
        """The second half of `save`: write and commit, together with the other ranks.

        Raises:
            CheckpointError: as `save` does.
        """
        return self._saver.write(step, share, self.lock, partial(self.prune, step))

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
