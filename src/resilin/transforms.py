"""What a transform of a noun passes on to the noun it wraps.

A method changes one thing about a noun and leaves the rest as it is: it subclasses one of these and overrides that one
thing. Hooks reach what is wrapped; state is saved for both; anything else asked of a source or an optimizer (its
vocabulary, its tokenizer, its parts) is answered by what is wrapped.

A transform without state of its own is invisible in a checkpoint: it can be added, or left out, when a run goes on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from resilin.keys import Keys
from resilin.nouns import Batch, Loss, Objective, Optimizer, Source, State, StepView, keeps_weights

_OWN, _INNER = "transform", "inner"


class _Transform:
    """Hooks and state of a transform. Override `own_state` and `load_own_state` where there is some."""

    inner: Any

    def __init_subclass__(cls, **more: Any) -> None:
        super().__init_subclass__(**more)
        if cls.own_state is not _Transform.own_state and cls.load_own_state is _Transform.load_own_state:
            # Now, and not when a run that saved such state for hours is to be resumed.
            raise TypeError(f"{cls.__name__} saves state (own_state) and cannot take it back: define load_own_state")

    @keeps_weights
    def before_step(self, view: StepView) -> None:
        """Passed on; an override calls `super().before_step(view)` first."""
        if hasattr(self.inner, "before_step"):
            self.inner.before_step(view)

    def after_step(self, view: StepView) -> None:
        """Passed on; an override calls `super().after_step(view)` first."""
        if hasattr(self.inner, "after_step"):
            self.inner.after_step(view)

    def own_state(self) -> State:
        """What this transform itself must save; {} for nothing."""
        return {}

    def load_own_state(self, state: State) -> None:
        """Take back what `own_state` gave; a subclass that overrides one overrides the other."""

    def state_dict(self) -> State:
        """The state of what is wrapped and, where this transform has some, its own."""
        own: State = self.own_state()
        inner: State = self.inner.state_dict()
        return {_OWN: {"name": type(self).__name__, "state": own}, _INNER: inner} if own else inner

    def load_state_dict(self, state: State) -> None:
        """Take both back.

        Raises:
            ValueError: this transform has state, and the checkpoint none of it; or the reverse.
        """
        saved, mine = state.get(_OWN) if set(state) == {_OWN, _INNER} else None, type(self).__name__
        if saved is not None and saved["name"] == mine:
            self.load_own_state(saved["state"])
            self.inner.load_state_dict(state[_INNER])
        elif self.own_state():
            raise ValueError(
                f"the checkpoint holds no state for {mine}: it was saved without it; resume with the settings the run "
                "was started with"
            )
        elif saved is not None and not isinstance(self.inner, _Transform):
            raise ValueError(
                f"the checkpoint holds the state of {saved['name']}, which this run does not use: resume with the "
                "settings the run was started with"
            )
        else:
            self.inner.load_state_dict(state)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "inner":  # copying and unpickling ask before `inner` is there
            raise AttributeError(name)
        return getattr(self.inner, name)


def may_change_weights(part: object) -> bool:
    """Whether a part's `before_step`, or that of something it wraps, is not marked `resilin.nouns.keeps_weights`."""
    hook = getattr(part, "before_step", None)
    if hook is None:
        return False
    if not getattr(hook, "keeps_weights", False):
        return True
    return isinstance(part, _Transform) and may_change_weights(part.inner)


def read_for(source: Any, step: int, slots: Sequence[int], samples: Sequence[int]) -> Batch:
    """Samples of a pool (`resilin.data.pool`) as the slots of a step: who chooses the samples of a step asks for this.

    A source decides how its samples are seen in a step (their shape, a random view) with a method of this name; one
    without shows them as `read(samples)` does.

    Args:
        source: the pool.
        step: the step they are for.
        slots: the slot that each one takes.
        samples: their numbers, as many.
    """
    if hasattr(source, "read_for"):
        found: Batch = source.read_for(step, slots, samples)
        return found
    return Batch(torch.as_tensor(list(slots), dtype=torch.int64), source.read(samples).fields)


class SourceTransform(_Transform):
    """A source made of a source.

    Override `shown` to change how samples are seen, whoever chooses them; `slots` and `fetch` to change which ones a
    step has. What would go round an override is not passed on: the samples by number where `fetch` is overridden and
    `read_for` is not, the source in another shape (`resampled`) where either is.
    """

    inner: Source

    def __init__(self, inner: Source) -> None:
        self.inner = inner

    def slots(self, step: int) -> int:
        """How many slots step `step` has."""
        return self.inner.slots(step)

    def shown(self, step: int | None, batch: Batch) -> Batch:
        """What becomes of samples of the source behind; `step` is None where they are looked at outside any step."""
        return batch

    def fetch(self, step: int, slots: Sequence[int]) -> Batch:
        """The samples of these slots."""
        return self.shown(step, self.inner.fetch(step, slots))

    def read(self, samples: Sequence[int]) -> Batch:
        """Samples by number, where the source behind has such (see `resilin.data.pool.Pool`)."""
        return self.shown(None, self.inner.read(samples))  # type: ignore[attr-defined]

    def read_for(self, step: int, slots: Sequence[int], samples: Sequence[int]) -> Batch:
        """Samples by number, as the slots of a step: see `read_for` above."""
        if self._overrides("read"):
            return Batch(torch.as_tensor(list(slots), dtype=torch.int64), self.read(samples).fields)
        return self.shown(step, read_for(self.inner, step, slots, samples))

    def _overrides(self, *names: str) -> bool:
        return any(getattr(type(self), name) is not getattr(SourceTransform, name) for name in names)

    def __getattr__(self, name: str) -> Any:
        if name == "pool_parts" and self._overrides("fetch") and not self._overrides("read_for"):
            raise AttributeError(name)
        if name == "resampled" and self._overrides("fetch", "shown"):
            raise AttributeError(name)
        return super().__getattr__(name)

    def __len__(self) -> int:
        """Batches of a validation source."""
        return len(self.inner)  # type: ignore[arg-type]

    def __bool__(self) -> bool:
        return True  # an endless source has no length to be false by


class ObjectiveTransform(_Transform):
    """An objective made of an objective."""

    inner: Objective

    def __init__(self, inner: Objective) -> None:
        self.inner = inner

    def __call__(self, model: nn.Module, batch: Batch, keys: Keys | None) -> Loss:
        """The loss of what is wrapped."""
        return self.inner(model, batch, keys)


class OptimizerTransform(_Transform):
    """An optimizer made of an optimizer."""

    inner: Optimizer

    def __init__(self, inner: Optimizer) -> None:
        self.inner = inner

    def step(self, step: int) -> Mapping[str, float]:
        """The update of what is wrapped."""
        return self.inner.step(step)

    def zero_grad(self) -> None:
        """Drop all gradients."""
        self.inner.zero_grad()
