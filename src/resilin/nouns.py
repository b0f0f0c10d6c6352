"""The four nouns a run is made of, and the two values that pass between them.

A step is B **slots**: sample positions of the global batch. A `Source` turns slots into a `Batch`; an
`Objective` turns (model, batch, keys) into a `Loss`, always the *sum* over valid units together with their count,
so that any split of the batch over micro-batches or workers gives the same gradient; an `Optimizer` applies it.
The model is a plain `torch.nn.Module`. A method is a transform of one noun; the step loop knows none by name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor, nn

from resilin.keys import Keys

State = dict[str, Any]
"""What a noun saves: a tree of dicts and lists whose leaves are tensors, `Deferred` ones too, or JSON values. Never a
pickle."""


@dataclass(frozen=True, eq=False)
class Deferred:
    """A tensor that is read or computed when it is its turn to be written, so that a state need not be in memory.

    Attributes:
        dtype: of its elements.
        shape: of it.
        read: gives it; asked once for each save.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    read: Callable[[], Tensor]


@dataclass(frozen=True, slots=True)
class Batch:
    """The samples of some slots of one step.

    Attributes:
        slots_B: int64, the slot (position in the step's global batch) of each sample.
        fields: tensors whose first dimension is B, by name. Language sources give `tokens` (B, T) int64 and
            `labels` (B, T) int64 (already shifted: `labels[b, t]` is what follows `tokens[b, t]`, -100 is not a
            unit), and, when documents are packed, `positions` (B, T) int64 restarting with each document and
            `documents` (B, T) int32 numbering documents within the row (attention stays inside one document).
    """

    slots_B: Tensor
    fields: Mapping[str, Tensor]

    def __getitem__(self, name: str) -> Tensor:
        try:
            return self.fields[name]
        except KeyError:
            have = ", ".join(sorted(self.fields)) or "none"
            raise KeyError(f"the batch has no field {name!r}; its fields are: {have}") from None

    def get(self, name: str) -> Tensor | None:
        """The field called `name`, or None where the source gives none."""
        return self.fields.get(name)

    def __len__(self) -> int:
        return int(self.slots_B.shape[0])

    def __post_init__(self) -> None:
        for name, tensor in self.fields.items():
            if tensor.shape[:1] != self.slots_B.shape:
                raise ValueError(
                    f"batch field {name!r} has shape {tuple(tensor.shape)}: its first dimension should be the "
                    f"number of slots, {len(self)}"
                )

    def to(self, device: torch.device | str) -> Batch:
        """The same batch with its fields on `device` (slots stay on the host)."""
        moved = {name: tensor.to(device, non_blocking=True) for name, tensor in self.fields.items()}
        return Batch(self.slots_B, moved)

    def rows(self, start: int, stop: int) -> Batch:
        """Samples `start` (inclusive) to `stop` (exclusive), as views."""
        return Batch(self.slots_B[start:stop], {n: t[start:stop] for n, t in self.fields.items()})


@dataclass(frozen=True, slots=True)
class Mean:
    """A logged ratio: sums and counts add over micro-batches and workers; the value is `sum / count`."""

    sum: Tensor
    count: Tensor

    def merge(self, other: Mean) -> Mean:
        """The ratio over both parts."""
        return Mean(self.sum + other.sum, self.count + other.count)

    def value(self) -> float:
        """`sum / count`, or NaN for an empty count."""
        count = float(self.count)
        return float(self.sum) / count if count else float("nan")


@dataclass(frozen=True, slots=True)
class Max:
    """A logged maximum over micro-batches and workers."""

    max: Tensor

    def merge(self, other: Max) -> Max:
        """The larger of both."""
        return Max(torch.maximum(self.max, other.max))

    def value(self) -> float:
        """The maximum as a number."""
        return float(self.max)


Log = Mean | Max


@dataclass(frozen=True, slots=True)
class Loss:
    """What an objective says of a batch.

    Attributes:
        sum: 0-d tensor with a graph: the loss summed over the valid units of the batch.
        units: 0-d tensor without a graph: how many valid units (tokens, pairs, images) were summed.
        logs: further quantities by name; detached.
    """

    sum: Tensor
    units: Tensor
    logs: Mapping[str, Log] = field(default_factory=dict)


@runtime_checkable
class Source(Protocol):
    """`slots -> batch`: deterministic, so any worker can fetch any slot of any step, now or after a resume."""

    def slots(self, step: int) -> int:
        """How many slots step `step` has."""

    def fetch(self, step: int, slots: Sequence[int]) -> Batch:
        """The samples of these slots of step `step`; the same for everyone who asks."""

    def state_dict(self) -> State:
        """What cannot be computed from the step: often nothing."""

    def load_state_dict(self, state: State) -> None:
        """Take a saved state back; refuse one of another data set by name."""


@runtime_checkable
class Objective(Protocol):
    """`(model, batch, keys) -> Loss`. State it adds (a teacher, a Fisher diagonal) is saved like any other.

    Optional: `unit`, what its units are in the plural ("images"; "tokens" where it does not say), for people to read.
    """

    def __call__(self, model: nn.Module, batch: Batch, keys: Keys | None) -> Loss:
        """The loss sum, its units and logs; every random choice is drawn from `keys` (None: evaluation, none)."""

    def state_dict(self) -> State:
        """State beside the model's, or {}."""

    def load_state_dict(self, state: State) -> None:
        """Take a saved state back."""


@runtime_checkable
class Optimizer(Protocol):
    """Turns the gradients in `.grad` into an update; its schedule is a function of the step."""

    def step(self, step: int) -> Mapping[str, float]:
        """Apply the update of step `step` (from 0); returns what to log, at least `lr`."""

    def zero_grad(self) -> None:
        """Drop all gradients."""

    def state_dict(self) -> State:
        """Moments by parameter *name*, so that a checkpoint does not depend on parameter order."""

    def load_state_dict(self, state: State) -> None:
        """Take saved moments back; errors name the parameter that is missing or has another shape."""


@dataclass(frozen=True, slots=True)
class StepView:
    """What a part that listens to the run may see and, between steps, change.

    Attributes:
        step: steps committed so far.
        logs: after a step, what it logs.
        autocast: enters the format the step computes in: a part that calls the model by itself should do so inside.
        steps: of the whole run; None where that is not known.
        notes: what parts add to the step's logs.
    """

    step: int
    source: Source
    model: nn.Module
    objective: Objective
    optimizer: Optimizer
    keys: Keys
    logs: Mapping[str, float] = field(default_factory=dict)
    autocast: Callable[[], AbstractContextManager[object]] = nullcontext
    steps: int | None = None
    notes: dict[str, float] = field(default_factory=dict)

    def note(self, name: str, value: float) -> None:
        """After a step: add a quantity to what that step logs."""
        self.notes[name] = value


Hook = TypeVar("Hook", bound=Callable[..., None])


def keeps_weights(hook: Hook) -> Hook:
    """Marks a `before_step` that writes to no trainable parameter and no tensor of the optimizer's state, ever.

    The run then calls it while those are still being copied for a checkpoint; before any other it waits. What the hook
    calls counts, but not what a transform's `super().before_step` passes on: that is asked for itself. The mark is on
    the function, so one that overrides it does not have it.
    """
    hook.keeps_weights = True  # type: ignore[attr-defined]
    return hook


@runtime_checkable
class BeforeStep(Protocol):
    """Optional on any noun, transform or sub-module: called before each step's batch is fetched."""

    def before_step(self, view: StepView) -> None:
        """Re-select data, sample a budget, move a mask, ... as a function of the view only.

        One that changes no weights says so (`keeps_weights`), and a save in the background costs less.
        One that raises leaves its state as it was: the run saves what is committed, and a resume calls it again.
        """


@runtime_checkable
class BeforeEvaluation(Protocol):
    """Optional on any noun, transform or sub-module: called when the run is about to evaluate after a step."""

    def before_evaluation(self, view: StepView) -> None:
        """Measure again the statistics that the evaluated model needs, ... as a function of the view only."""


@runtime_checkable
class Milestones(Protocol):
    """Optional on any noun or transform: moments at which a run that evaluates, or saves, does so besides its own."""

    def milestone(self, step: int) -> bool:
        """Whether to evaluate and save after `step` steps: the end of a phase, say."""


@runtime_checkable
class AfterStep(Protocol):
    """Optional on any noun, transform or sub-module: called after each committed step, with its logs."""

    def after_step(self, view: StepView) -> None:
        """Update a moving average, observe losses, ... as a function of the view only."""
