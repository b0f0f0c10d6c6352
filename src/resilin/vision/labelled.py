"""A source of labelled samples on a grid: shuffled, split, augmented by key, the same for everyone who asks."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Sequence
from typing import Annotated, Any, Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from resilin.config import Settings
from resilin.data.errors import DataError
from resilin.data.order import BatchSizes, SampleOrder
from resilin.data.permutation import Permutation
from resilin.data.pool import check_samples
from resilin.data.settings import SourceContext, SourceSettings
from resilin.keys import Keys, hash64
from resilin.nouns import Batch, State
from resilin.vision.augment import DRAWS
from resilin.vision.grid import Grid


class Split(Settings):
    """The validation split. It does not depend on the run's seed, and takes the same part of every class."""

    fraction: float = Field(default=0.1, ge=0, lt=1)
    """Part of each class that is held out; 0: none."""
    by: Literal["random", "tail"] = "random"
    """random: drawn at random; tail: the last ones of each class in the order of the files (the latest, where files
    are cut from one recording)."""
    seed: int = 0
    """Which are drawn."""


class Samples(Protocol):
    """Data that can be shown on any grid.

    Attributes:
        labels_N, classes: the label of each sample, and the names of labels.
        digest: changes with the data.
    """

    labels_N: NDArray[np.int64]
    classes: tuple[str, ...]
    digest: str

    @property
    def fixed_views(self) -> int:
        """Views of a sample that validation averages over."""

    def view(self, index: int, grid: Grid, full: Grid, u: list[float] | None, number: int | None = None) -> Tensor:
        """A view of sample `index`, channels first, as `batch` takes it.

        Args:
            index: which sample.
            grid: the shape wanted.
            full: the shape that settings are about.
            u: `DRAWS` uniform numbers; None: a fixed view.
            number: which fixed view; None: the one in the middle.
        """

    def batch(self, views: Sequence[Tensor]) -> Tensor:
        """Views of one shape as a batch of float32."""


class LabelledSettings(SourceSettings):
    """What every source of labelled samples has in common."""

    shuffle: bool = True
    """A new random order each epoch."""
    epochs: Annotated[int, Field(ge=1)] | None = None
    """Passes over the data, after which the source ends; left out, it goes on for ever."""
    held_out: Split = Split()
    """The validation split."""
    augment: bool = True
    """Draw random views for training; False: the fixed views of validation."""

    def source(
        self, samples: Samples, grid: Grid, context: SourceContext, *, split_known: bool = False
    ) -> LabelledSource:
        """The source of one split.

        Args:
            samples: of both splits, or of one.
            grid: their shape.
            context: what the run says.
            split_known: the samples hold only this split.
        """
        training = context.split == "train"
        labels_N = samples.labels_N
        rows_N = np.arange(len(labels_N)) if split_known else split_rows(labels_N, self.held_out, training=training)
        if not len(rows_N):
            raise DataError(
                f"the {context.split} split has no sample: "
                + ("lower" if training else "raise")
                + f" held_out.fraction ({self.held_out.fraction:g}), or give more data"
            )
        order = SampleOrder(
            rows=len(rows_N),
            seed=context.seed if training else hash64("validation order", self.held_out.seed),
            batch_sizes=BatchSizes(context.batch_size),
            # A validation split in the order of the files would show one class after another.
            shuffle=self.shuffle or not training,
            epochs=self.epochs if training else 1,
        )
        own = self.model_dump(mode="json", exclude={"on_error", "cache", "epochs"})
        digest = hashlib.sha256(json.dumps([samples.digest, context.split, own], sort_keys=True).encode()).hexdigest()
        views = 1 if training else samples.fixed_views
        return LabelledSource(samples, rows_N, order, grid, context.seed, training and self.augment, digest, views)


def split_rows(labels_N: NDArray[np.int64], split: Split, *, training: bool) -> NDArray[np.int64]:
    """The samples of one split, in increasing order.

    Raises:
        DataError: for a class that has too few samples to hold one out and keep one.
    """
    if not split.fraction:
        return np.arange(len(labels_N)) if training else np.empty(0, np.int64)
    kept = []
    for label in np.unique(labels_N):
        members = np.flatnonzero(labels_N == label)
        held = max(1, round(len(members) * split.fraction))
        if held >= len(members):
            raise DataError(
                f"class {label} has {len(members)} sample{'s' if len(members) != 1 else ''}: none is left to train on "
                "once some are held out; give it more, or set held_out.fraction = 0"
            )
        if split.by == "random":
            chosen = Permutation(len(members), hash64("held out", split.seed, int(label)))(np.arange(held))
        else:
            chosen = np.arange(len(members) - held, len(members))
        out = np.zeros(len(members), bool)
        out[chosen] = True
        kept.append(members[~out] if training else members[out])
    return np.sort(np.concatenate(kept)) if kept else np.empty(0, np.int64)


class LabelledSource:
    """See `resilin.nouns.Source`. Batches hold `inputs` (B, C, ...) float32 and `labels` (B,) int64.

    For validation on several views of each sample they hold `views` (B, V, C, ...) instead of `inputs`.

    Attributes:
        grid: the shape of the samples it gives.
        full: the shape its settings are about; `grid` differs where somebody asked for another.
        classes: their names, by label.
        digest: changes with anything that changes what a slot holds, except seed and batch size.
        views: V, fixed views of each sample.
    """

    def __init__(
        self,
        samples: Samples,
        rows_N: NDArray[np.int64],
        order: SampleOrder,
        grid: Grid,
        seed: int,
        random: bool,
        digest: str,
        views: int = 1,
    ) -> None:
        self.samples, self.rows_N, self.order, self.views = samples, rows_N, order, views
        self.grid = self.full = grid
        self.seed, self.random, self.digest = seed, random, digest
        self.classes = samples.classes

    @property
    def epoch_length(self) -> int:
        """Samples of one pass."""
        return self.order.epoch_length

    def resampled(self, grid: Grid) -> LabelledSource:
        """The same samples in the same slots, on another grid."""
        if grid == self.grid:
            return self
        other = copy.copy(self)
        other.grid = grid
        return other

    def __len__(self) -> int:
        """Batches before the source ends."""
        if self.order.total is None:
            raise TypeError("a source without `epochs` never ends and has no length")
        return -(-self.order.total // self.order.batch_sizes.first)

    def __bool__(self) -> bool:
        return True  # a source without end has no length to be true by

    def slots(self, step: int) -> int:
        """Slots of a step; 0 after the end."""
        return self.order.slots(step)

    def fetch(self, step: int, slots: Sequence[int]) -> Batch:
        """The samples of these slots.

        Raises:
            DataError: for slots the step does not have, or a file that can no longer be read.
        """
        return self.fetch_steps([(step, slots)])

    def fetch_steps(self, parts: Sequence[tuple[int, Sequence[int]]]) -> Batch:
        """The samples of some slots of several steps, one step after the other: what `fetch` gives for each, sooner."""
        rows_B = self.rows_N[np.concatenate([self.order.row_of(step, slots) for step, slots in parts])]
        slots_B = torch.tensor([slot for _, slots in parts for slot in slots], dtype=torch.int64)
        if not self.random:
            return self._fixed(rows_B, slots_B, self.views)
        steps_B = torch.tensor([step for step, slots in parts for _ in slots], dtype=torch.int64)
        return self._random(rows_B, slots_B, steps_B)

    @property
    def pool_parts(self) -> tuple[int, ...]:
        """The samples of this split, as a pool (see `resilin.data.pool.Pool`)."""
        return (len(self.rows_N),)

    def read(self, samples: Sequence[int]) -> Batch:
        """Samples of this split by number, each in the fixed view of its middle.

        Raises:
            DataError: for numbers outside the pool, or a file that can no longer be read.
        """
        return self._fixed(self.rows_N[check_samples(samples, len(self.rows_N))], torch.arange(len(samples)), 1)

    def read_for(self, step: int, slots: Sequence[int], samples: Sequence[int]) -> Batch:
        """Samples by number as the slots of a step, in the random views of these slots."""
        rows_B = self.rows_N[check_samples(samples, len(self.rows_N))]
        slots_B = torch.tensor(list(slots), dtype=torch.int64)
        if not self.random:
            return self._fixed(rows_B, slots_B, self.views)
        return self._random(rows_B, slots_B, torch.full_like(slots_B, step))

    def _random(self, rows_B: NDArray[np.int64], slots_B: Tensor, steps_B: Tensor) -> Batch:
        """Samples in the random views of these slots of these steps."""
        # All draws at once: for a few slots the generator costs as much as the views.
        draws = Keys(self.seed, 0, slots_B, ("view",), steps_B).uniform((DRAWS,)).tolist()
        rows = rows_B.tolist()
        views = [self.samples.view(row, self.grid, self.full, u) for row, u in zip(rows, draws, strict=True)]
        labels_B = torch.from_numpy(self.samples.labels_N[rows_B])
        return Batch(slots_B, {"inputs": self.samples.batch(views), "labels": labels_B})

    def _fixed(self, rows_B: NDArray[np.int64], slots_B: Tensor, views: int) -> Batch:
        """Samples in their fixed views; a single one is that of the middle."""
        numbers = range(views) if views > 1 else (None,)
        shown = [
            self.samples.batch([self.samples.view(row, self.grid, self.full, None, n) for row in rows_B.tolist()])
            for n in numbers
        ]
        inputs = {"views": torch.stack(shown, dim=1)} if views > 1 else {"inputs": shown[0]}
        return Batch(slots_B, {**inputs, "labels": torch.from_numpy(self.samples.labels_N[rows_B])})

    def state_dict(self) -> State:
        """Nothing to continue from but the step; what is here guards against resuming on other data."""
        return {"digest": self.digest, "seed": self.seed, "batch_size": self.order.batch_sizes.first}

    def load_state_dict(self, state: State) -> None:
        """Refuse the state of other data, another seed or another batch size: slots would hold other samples."""
        for name, mine in self.state_dict().items():
            if state.get(name) != mine:
                raise DataError(
                    f"the checkpoint's {name} was {_short(state.get(name))}, now it is {_short(mine)}: resume with the "
                    "data and the source settings of its settings.toml"
                )


def _short(value: Any) -> str:
    return f"{value[:12]}..." if isinstance(value, str) and len(value) > 12 else repr(value)
