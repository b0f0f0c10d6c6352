"""Checkpoints in a folder: `step-00000100/` with safetensors files and `index.json`.

A save writes into `.saving-step-00000100/`, one file per top-level key of the tree (so `model.safetensors` opens in
any tool), each brought to disk, the index last, and then renames the folder. Whatever interrupts it, the folders
named `step-*` are whole; leftovers begin with a dot and go with the next save.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import time
import warnings
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch

from resilin.checkpoint.atomic import rename
from resilin.checkpoint.errors import CheckpointError, DamagedError
from resilin.checkpoint.index import INDEX_NAME, read_index
from resilin.checkpoint.lock import lock_folder, unlock_folder
from resilin.checkpoint.read import load_checkpoint, quick_check
from resilin.checkpoint.store import SavedCheckpoint
from resilin.checkpoint.tensor_write import check_tensor
from resilin.checkpoint.tree import TakenApart, take_apart
from resilin.checkpoint.write import write_checkpoint
from resilin.nouns import State

_STEP = re.compile(r"step-(\d{8,})")
_SAVING, _OLD, _REMOVING = ".saving-", ".old-", ".removing-"
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
    """A `CheckpointStore` in one folder, written by one process at a time.

    Args:
        path: the folder; made at the first save.
        keep_last: how many of the newest checkpoints to keep; 0: all.
        keep_every: checkpoints of steps divisible by this are kept besides; 0: none.
    """

    def __init__(self, path: Path, keep_last: int = 0, keep_every: int = 0) -> None:
        if keep_last < 0 or keep_every < 0:
            raise ValueError(f"keep_last ({keep_last}) and keep_every ({keep_every}) cannot be negative")
        self.path = Path(path)
        self.keep_last = keep_last
        self.keep_every = keep_every
        self._locked = False

    def lock(self) -> None:
        """Make this process the only one that may save here, until `close` or its end; `save` does so by itself.

        Raises:
            CheckpointError: when another process is, or the folder cannot be made.
        """
        if self._locked:
            return
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock_folder(self.path)
        except OSError as error:
            raise CheckpointError(f"{self.path}: checkpoints cannot be kept here: {error.strerror}") from error
        self._locked = True

    def close(self) -> None:
        """Let other processes save here."""
        if self._locked:
            unlock_folder(self.path)
            self._locked = False

    def step_path(self, step: int) -> Path:
        """The folder of a step's checkpoint, whether or not it exists."""
        final, old = self.path / step_name(step), self.path / (_OLD + step_name(step))
        # A save of the same step was killed between its two renames: the earlier one is the good one.
        return old if old.exists() and not final.exists() else final

    def _names(self) -> list[int]:
        try:
            names = os.listdir(self.path)  # noqa: PTH208  # names only, and many of them
        except (FileNotFoundError, NotADirectoryError):
            return []
        found = (_STEP.fullmatch(name.removeprefix(_OLD)) for name in names)
        return sorted({int(match[1]) for match in found if match})

    def steps(self) -> list[int]:
        """The steps whose checkpoints are whole (index readable, every file present with its size), ascending."""
        damaged = self.damaged()
        return [step for step in self._names() if step not in damaged]

    def damaged(self) -> dict[int, str]:
        """The steps whose folders are there but not whole, and what is wrong with each."""
        wrong = {}
        for step in self._names():
            try:
                quick_check(self.step_path(step))
            except CheckpointError as error:
                wrong[step] = str(error)
        return wrong

    def latest(self) -> int | None:
        """The newest step whose checkpoint is whole, or None; warns about newer ones that are not."""
        for step in reversed(self._names()):
            try:
                quick_check(self.step_path(step))
                return step
            except CheckpointError as error:
                warnings.warn(f"the checkpoint of step {step} is passed over: {error}", stacklevel=2)
        return None

    def load(
        self,
        step: int,
        device: torch.device | str = "cpu",
        *,
        parts: Collection[str] | None = None,
        mapped: bool = False,
        verify: bool = True,
    ) -> State:
        """The tree of a step; the options are those of `load_checkpoint`.

        Raises:
            CheckpointError: when there is none, naming those there are; or when it is damaged.
        """
        path = self.step_path(step)
        if not path.exists():
            have = ", ".join(map(str, self.steps())) or "none"
            raise CheckpointError(f"{self.path}: there is no checkpoint of step {step}; steps here: {have}")
        try:
            return load_checkpoint(path, device, parts=parts, mapped=mapped, verify=verify)
        except DamagedError as error:
            others = [str(other) for other in self.steps() if other != step]
            hint = f"; checkpoints of other steps here: {', '.join(others)} (move {path} away to go on from the newest)"
            raise DamagedError(f"{error}{hint if others else ''}") from None

    def parts_of(self, step: int, *wanted: str) -> list[str]:
        """Which of these top-level keys the checkpoint of a step holds; none where there is no such checkpoint."""
        path = self.step_path(step)
        tree = read_index(path).tree if path.exists() else None
        return [part for part in wanted if isinstance(tree, dict) and part in tree]

    def save(self, step: int, tree: Mapping[str, Any]) -> SavedCheckpoint:
        """Write a tree and, once it is safe, remove what need not be kept.

        Tensors are written as they are when this is called, and may change as soon as it returns.

        Args:
            step: steps committed; an existing checkpoint of this step is replaced, and lost only when the new one is
                complete.
            tree: dicts with text keys and lists, holding tensors and JSON values (NaN and infinities too). Two
                places that hold the same view of the same memory do so again after loading.

        Raises:
            CheckpointError: when the tree holds something else, another process saves here, or the disk is full or
                refuses; earlier checkpoints are untouched, and nothing half-written stays behind.
        """
        if step < 0:
            raise ValueError(f"step ({step}) cannot be negative")
        started = time.perf_counter()
        apart = take_apart(tree)
        for name, tensor in apart.tensors.items():
            check_tensor(name, tensor)
        self.lock()
        temporary = self.path / (_SAVING + step_name(step))
        try:
            self._clean()
            temporary.mkdir()
            before = [self.step_path(other) for other in self._names() if other != step]
            size = write_checkpoint(temporary, step, apart, before[-1] if before else None)
            self._commit(temporary, step)
        except OSError as error:
            shutil.rmtree(temporary, ignore_errors=True)
            raise CheckpointError(self._failure(step, apart, error)) from error
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        pruned = self._prune(step)
        return SavedCheckpoint(step, self.path / step_name(step), size, time.perf_counter() - started, pruned)

    def drop_after(self, step: int) -> tuple[int, ...]:
        """Remove the checkpoints of later steps, as a run does that goes on from an earlier one.

        Returns:
            Their steps.
        """
        self.lock()
        return self._remove([later for later in self._names() if later > step])

    def _commit(self, temporary: Path, step: int) -> None:
        final, old = self.path / step_name(step), self.path / (_OLD + step_name(step))
        if not final.exists():
            rename(temporary, final)
            return
        rename(final, old)
        try:
            rename(temporary, final)
        except BaseException:
            if not final.exists():
                with contextlib.suppress(OSError):
                    rename(old, final)
            raise
        shutil.rmtree(old, ignore_errors=True)

    def _clean(self) -> None:
        for path in self.path.glob(".*step-*"):
            if path.name.startswith((_SAVING, _REMOVING)):
                shutil.rmtree(path, ignore_errors=True)
            elif path.name.startswith(_OLD):
                final = self.path / path.name.removeprefix(_OLD)
                if final.exists():
                    shutil.rmtree(path, ignore_errors=True)
                else:
                    rename(path, final)

    def _failure(self, step: int, apart: TakenApart, error: OSError) -> str:
        good = [other for other in self._names() if other != step or (self.step_path(step) / INDEX_NAME).exists()]
        still = f"the checkpoint of step {good[-1]} is still good" if good else "there is no earlier checkpoint"
        if error.errno not in _FULL:
            return f"{self.path}: the checkpoint of step {step} could not be saved ({error}); {still}"
        needed = sum(tensor.numel() * tensor.element_size() for tensor in apart.tensors.values())
        free = shutil.disk_usage(self.path).free
        return (
            f"{self.path}: the disk is full: the checkpoint of step {step} needs {_size(needed)} and {_size(free)} "
            f"are free ({error.strerror}); {still}. Free some space, or keep fewer checkpoints, and resume"
        )

    def _prune(self, saved: int) -> tuple[int, ...]:
        if not self.keep_last:
            return ()
        others = [step for step in self._names() if step != saved]
        keep = set(others[-(self.keep_last - 1) :]) if self.keep_last > 1 else set()
        if self.keep_every:
            keep.update(step for step in others if step % self.keep_every == 0)
        return self._remove([step for step in others if step not in keep])

    def _remove(self, steps: Collection[int]) -> tuple[int, ...]:
        removed = []
        for step in steps:
            path, doomed = self.step_path(step), self.path / (_REMOVING + step_name(step))
            try:
                # Renamed first, so that a removal cut short leaves no folder that looks like a checkpoint.
                os.rename(path, doomed)  # noqa: PTH104
                shutil.rmtree(doomed)
                removed.append(step)
            except OSError as error:
                warnings.warn(f"{path}: an old checkpoint could not be removed ({error})", stacklevel=3)
        return tuple(removed)
