"""How a run's state becomes safe: at once, or in the background while it goes on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

from torch import nn

from resilin.checkpoint.background import BackgroundSaves, Pending
from resilin.checkpoint.errors import CheckpointError
from resilin.checkpoint.folder import CheckpointFolder
from resilin.checkpoint.storage import Location
from resilin.checkpoint.store import SavedCheckpoint
from resilin.layout import Layout
from resilin.nouns import State
from resilin.parallel import activity
from resilin.run.events import Event, Failure, Saved, Staged
from resilin.run.steady import steady_tensors


class Savable(Protocol):
    """What is saved: a `Run`."""

    checkpoints: CheckpointFolder | None
    saves: BackgroundSaves | None
    layout: Callable[[State], Layout] | None
    model: nn.Module
    step: int

    def state_dict(self) -> State:
        """Everything needed to go on as if never stopped."""

    def tell(self, event: Event) -> None:
        """An event, to all listeners."""


class Saving:
    """The saves of a run.

    Args:
        run: whose folder of checkpoints, and whose way to save, may be others after a while.

    Attributes:
        place: of the newest checkpoint that is safe; None: there is none yet.
        again: whether a save under way was given up, and is to be begun anew before the next step.
    """

    def __init__(self, run: Savable) -> None:
        self._run = run
        self.place: Location | None = None
        self.again = False
        self._told: CheckpointError | None = None
        self._pending: Pending | None = None

    @property
    def staging(self) -> bool:
        """Whether there is a save whose state is perhaps not all copied yet."""
        return self._pending is not None

    def begin(self) -> None:
        """Save, but what the next step does not change before its update may be copied until then.

        Raises:
            CheckpointError: when it, or the one before it, cannot be written; earlier ones are untouched.
        """
        run = self._run
        if run.checkpoints is None:
            raise ValueError("this run has no checkpoint folder: give it one, or do not ask it to save")
        self.finish_staging()
        activity.doing("saving")
        with self._telling_failures():
            state = run.state_dict()
            layout = run.layout(state) if run.layout is not None else None
            if run.saves is None:
                self._tell_saved(run.checkpoints.save(run.step, state, layout))
            else:
                steady = steady_tensors(run.model, state["optimizer"])
                self._pending = run.saves.save(run.step, state, layout, steady=steady)
                self.note()

    def finish_staging(self) -> None:
        """Before anything that may change what is trained: all of a state that is being saved is copied."""
        saves = self._run.saves
        if self._pending is not None and saves is not None:
            pending, waited = self._pending, saves.staged()
            self._pending = None
            self._run.tell(Staged(step=pending.step, seconds=pending.seconds + waited))

    def wait(self) -> None:
        """Return when everything that was saved is safe on disk.

        Raises:
            CheckpointError: it could not be written.
        """
        if self._run.saves is not None:
            self.finish_staging()
            with self._telling_failures():
                self._run.saves.wait()
                self.note()

    def leave(self) -> None:
        """Give up a save under way, whose workers are not all there any more; it is begun anew before the next step."""
        run, self._pending = self._run, None
        if run.saves is not None:
            run.saves.staged()
            try:
                run.saves.close()
            except CheckpointError:
                self.again = True
            self._note_what_is_safe()
        if run.checkpoints is not None:
            run.checkpoints.close()

    def note(self) -> None:
        """Tell of what became safe meanwhile.

        Raises:
            CheckpointError: something could not be written.
        """
        if self._run.saves is not None:
            with self._telling_failures():
                self._note_what_is_safe()

    def if_new(self) -> None:
        """See to it that the present state is safe."""
        self.wait()
        checkpoints = self._run.checkpoints
        if checkpoints is not None and checkpoints.latest() != self._run.step:
            self.now()

    def now(self) -> Location | None:
        """Save, and wait until that is safe; gives the place, or None where there is none to save to."""
        if self._run.checkpoints is None:
            return None
        self.begin()
        self.finish_staging()
        self.wait()
        return self.place

    def _note_what_is_safe(self) -> None:
        saves = self._run.saves
        while saves is not None and (saved := saves.poll()) is not None:
            self._tell_saved(saved)

    @contextmanager
    def _telling_failures(self) -> Iterator[None]:
        try:
            yield
        except CheckpointError as error:
            self.again = True  # where the run goes on all the same, as workers have changed only
            if error is not self._told:
                self._told = error
                self._run.tell(Failure(step=self._run.step, kind="save", message=str(error)))
            raise

    def _tell_saved(self, saved: SavedCheckpoint) -> None:
        self.place = saved.path
        path, pruned = str(saved.path), tuple(saved.pruned)
        self._run.tell(Saved(step=saved.step, path=path, bytes=saved.bytes, seconds=saved.seconds, pruned=pruned))
