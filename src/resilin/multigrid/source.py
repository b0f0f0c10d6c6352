"""A source whose batches have the shapes of a grid schedule."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

import torch
from pydantic import Field

from resilin.config import SettingsError, component
from resilin.data.settings import SourceContext, SourceSettings
from resilin.multigrid.pieces import Pieces
from resilin.multigrid.schedule import GridSchedule, Plan, ScheduleError, default_long_factors
from resilin.nouns import Batch, Source, StepView
from resilin.transforms import SourceTransform, read_for
from resilin.vision.grid import Grid

Factor = Annotated[float, Field(gt=0, le=1)]


class Multigrid(SourceSettings):
    """A source of samples on grids, in batches that grow as their samples become coarser.

    Any source with a `grid` and `resampled(grid)` will do (images, video and series of `resilin.vision` have them), and
    any of token rows. `train.batch_size` is that of the default shape. Validation is always at the default shape.
    """

    source: Annotated[SourceSettings, component("resilin.vision.videos:Videos")]
    """The source behind; its shape is the default shape."""
    long_cycle: bool = True
    """Change the shape every so many epochs."""
    short_cycle: bool = True
    """Change the size with every step. With both cycles off the source is the one behind, to the bit."""
    epochs: Annotated[int, Field(ge=2)]
    """Epochs of the plain run that this one replaces."""
    stages: Annotated[tuple[int, ...], Field(min_length=1)]
    """Epochs of the plain run at which its learning rate falls; after the last, the fine-tuning begins."""
    steps_per_epoch: Annotated[float, Field(gt=0)] | None = None
    """Steps of the plain run in an epoch; left out, by the samples of the source. With 1, epochs are plain steps."""
    long_factors: tuple[tuple[Factor, Factor], ...] = ()
    """(frames, size) of each shape, coarse to fine, as factors; left out: (1/4, 0.707), (1/2, 0.707), (1/2, 1), (1, 1),
    without what the data have no axis for."""
    short_factors: tuple[Factor, ...] = (0.5, 0.5**0.5)
    """Sizes of the short cycle as factors of the default size (of the length, where there is no size)."""
    epoch_factor: Annotated[float, Field(gt=0)] = 1.5
    """Epochs of this run over those of the plain one."""
    finetune_short_cycle: bool = True
    """Keep the short cycle in the last shape, as the authors' code does; False: the default shape alone."""
    final_shape: Literal["default", "cycle"] = "default"
    """What the fine-tuning trains on; cycle: the last of `long_factors`."""
    multiple: Annotated[int, Field(ge=1)] = 1
    """Sizes (lengths, where there is no size) are rounded to multiples of this: the patch of a vision transformer."""
    evaluations: Annotated[int, Field(ge=0)] = 3
    """Evaluations and checkpoints in each shape, where the run makes any; 0: one, at its end."""

    def build(self, context: SourceContext) -> Source:
        """The source of one split.

        Raises:
            SettingsError: the source behind has no grid, or the schedule does not fit.
        """
        inner = self.source.build(context)
        if context.split == "validation" or not (self.long_cycle or self.short_cycle):
            return inner
        gridded = as_gridded(inner)
        per_epoch = self.steps_per_epoch
        if per_epoch is None:
            samples = getattr(gridded, "epoch_length", None)
            if samples is None:
                raise SettingsError(
                    f"source: {type(inner).__name__} does not say how many samples an epoch has: set steps_per_epoch"
                )
            per_epoch = samples / context.batch_size
        return MultigridSource(gridded, self.schedule(gridded.grid, per_epoch), context.batch_size)

    def schedule(self, full: Grid, steps_per_epoch: float) -> GridSchedule:
        """The grid schedule for samples of a shape.

        Raises:
            SettingsError: naming what does not fit.
        """
        plan = Plan(
            full=full,
            epochs=self.epochs,
            stages=self.stages,
            steps_per_epoch=steps_per_epoch,
            long_cycle=self.long_cycle,
            short_cycle=self.short_cycle,
            long_factors=self.long_factors or default_long_factors(full),
            short_factors=self.short_factors,
            epoch_factor=self.epoch_factor,
            finetune_short_cycle=self.finetune_short_cycle,
            final_shape=self.final_shape,
            evaluations=self.evaluations,
            multiple=self.multiple,
        )
        try:
            return GridSchedule(plan)
        except ScheduleError as error:
            raise SettingsError(f"source: {error}") from None


def as_gridded(source: Source) -> Any:
    """A source that can be resampled: itself, or rows of tokens that can be cut.

    Raises:
        SettingsError: it is neither, or it chooses the samples of a step by itself.
    """
    if getattr(source, "steered", False):
        raise SettingsError(
            f"source: {type(source).__name__} decides which samples a step has and goes outside; Multigrid decides how "
            "many, and in what shape, and goes inside: around the source that is chosen from"
        )
    if hasattr(source, "resampled") and hasattr(source, "grid"):
        return source
    if hasattr(source, "sequence_length"):
        return Pieces(source)
    raise SettingsError(
        f"source: {type(source).__name__} can be shown in one shape only: it has neither grid and resampled(grid), nor "
        "a sequence_length"
    )


class MultigridSource(SourceTransform):
    """See `Multigrid`. Samples are read in the order of the source behind, each once an epoch, none left out.

    Attributes:
        grid_schedule: what other parts of the run read.
        batch_size: B, samples of a batch of the default shape.
    """

    def __init__(self, inner: Any, schedule: GridSchedule, batch_size: int) -> None:
        super().__init__(inner)
        self.gridded = inner
        self.grid_schedule, self.batch_size = schedule, batch_size

    def slots(self, step: int) -> int:
        """Samples of a step: fewer at the end of the source's data, 0 after the schedule."""
        if step >= self.grid_schedule.total:
            return 0
        phase = self.grid_schedule.phase(step)
        wanted = phase.multiplier * self.batch_size
        behind = self.gridded.resampled(phase.grid)
        first = self._first(step)
        if behind.slots((first + wanted - 1) // self.batch_size) == self.batch_size:
            return wanted
        count = 0
        while count < wanted:  # the end of the data: count what is left
            number, slot = divmod(first + count, self.batch_size)
            left = behind.slots(number) - slot
            if left <= 0:
                break
            count = min(wanted, count + left)
        return count

    def _first(self, step: int) -> int:
        """The place of a step's first sample in the order of the source behind."""
        return self.grid_schedule.samples_before(step) * self.batch_size

    def fetch(self, step: int, slots: Sequence[int]) -> Batch:
        """The samples of these slots, in the shape of the step."""
        return self.fetch_on(self.grid_schedule.phase(step).grid, self._first(step), slots)

    def read_for(self, step: int, slots: Sequence[int], samples: Sequence[int]) -> Batch:
        """Samples by number, in the shape of the step: for who chooses them (see `resilin.data.pool`)."""
        return read_for(self.gridded.resampled(self.grid_schedule.phase(step).grid), step, slots, samples)

    def fetch_on(self, grid: Grid, first: int, slots: Sequence[int]) -> Batch:
        """Samples `first + slot` of the order of the source behind, on a grid."""
        behind: Source = self.gridded.resampled(grid)
        asked = list(slots)
        groups: dict[int, list[int]] = {}
        for place, slot in enumerate(asked):
            groups.setdefault((first + slot) // self.batch_size, []).append(place)
        order = [place for places in groups.values() for place in places]
        wanted = [(n, [(first + asked[p]) % self.batch_size for p in places]) for n, places in groups.items()]
        # The type is asked, for a transform would answer with the method of what it wraps.
        at_once = getattr(type(behind), "fetch_steps", None)
        parts = [at_once(behind, wanted)] if at_once else [behind.fetch(number, slots) for number, slots in wanted]
        back = torch.empty(len(order), dtype=torch.int64)
        back[torch.tensor(order, dtype=torch.int64)] = torch.arange(len(order))
        fields = {}
        for name in parts[0].fields if parts else ():
            whole = torch.cat([part[name] for part in parts]) if len(parts) > 1 else parts[0][name]
            fields[name] = whole if order == sorted(order) else whole[back]
        return Batch(torch.tensor(asked, dtype=torch.int64), fields)

    def after_step(self, view: StepView) -> None:
        """Log the shape of the step."""
        super().after_step(view)
        phase = self.grid_schedule.phase(view.step - 1)
        view.note("multigrid/batch", float(phase.multiplier * self.batch_size))
        if phase.grid.frames:
            view.note("multigrid/frames", float(phase.grid.frames))
        if phase.grid.size:
            view.note("multigrid/size", float(phase.grid.size))

    def milestone(self, step: int) -> bool:
        """Whether to evaluate and save after `step` steps."""
        return step in self.grid_schedule.milestones

    def base_slots(self, step: int, number: int) -> int:
        """Slots of `base_batch`; 0 after the end of the data."""
        size = self.grid_schedule.segment(step).base.multiplier * self.batch_size
        last = self._first(step) + (number + 1) * size - 1
        return size if self.inner.slots(last // self.batch_size) == self.batch_size else 0

    def base_batch(self, step: int, number: int, slots: Sequence[int]) -> Batch:
        """Part of a batch of the long cycle's shape at a step, for statistics: the `number`-th from its samples on."""
        base = self.grid_schedule.segment(step).base
        first = self._first(step) + number * base.multiplier * self.batch_size
        return self.fetch_on(base.grid, first, slots)
