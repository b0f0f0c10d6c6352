"""The learning rate of a multigrid run: an optimizer whose schedule is read along the grid schedule."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Literal

from torch import nn

from resilin.config import SettingsError, component
from resilin.multigrid.schedule import GridSchedule, Segment
from resilin.nouns import StepView, keeps_weights
from resilin.optim.schedule import Schedule, count_steps
from resilin.optim.scheduled import Scheduled, ScheduledSettings
from resilin.optim.settings import OptimizerSettings
from resilin.optim.stepwise import Stepwise
from resilin.transforms import OptimizerTransform

Scaling = Literal["linear", "sqrt", "none"]


class MultigridRate(OptimizerSettings):
    """An optimizer whose learning rate follows the source's grid schedule; without one, the optimizer itself.

    The optimizer's settings are those of the plain run: warm-up and boundaries in steps, or fractions, of it.
    """

    optimizer: Annotated[ScheduledSettings, component("resilin.optim.sgd:SGD")]
    """The optimizer of the plain run."""
    scaling: Scaling = "linear"
    """How the learning rate follows the long cycle's batch: times its multiplier, its square root (for Adam), not."""

    def build(self, model: nn.Module, total_steps: int) -> MultigridOptimizer:
        """The optimizer, its moments created beside the parameters."""
        inner = self.optimizer.build(model, total_steps)
        return MultigridOptimizer(inner, self.optimizer, self.scaling, total_steps)


class MultigridOptimizer(OptimizerTransform):
    """See `MultigridRate`. It logs `multigrid/multiplier`, the long cycle's batch in default batches."""

    inner: Scheduled

    def __init__(self, inner: Scheduled, settings: ScheduledSettings, scaling: Scaling, total_steps: int) -> None:
        super().__init__(inner)
        self.settings, self.scaling, self.total_steps = settings, scaling, total_steps
        self.rate: GridRate | None = None

    @keeps_weights
    def before_step(self, view: StepView) -> None:
        """Learn of the grid schedule.

        Raises:
            SettingsError: the run's steps, boundaries or warm-up do not fit it.
        """
        super().before_step(view)
        schedule: GridSchedule | None = getattr(view.source, "grid_schedule", None)
        if schedule is None or self.rate is not None:
            return
        if self.total_steps != schedule.total:
            raise SettingsError(
                f"train.steps is {self.total_steps} and the grid schedule takes {schedule.total}: set train.steps = "
                f"{schedule.total}\n{schedule.describe()}"
            )
        self.rate = GridRate(schedule, self.settings.schedule, self.settings.lr, self.scaling)
        self.inner.schedule = self.rate

    def step(self, step: int) -> Mapping[str, float]:
        """The update of what is wrapped."""
        logs = self.inner.step(step)
        if self.rate is None:
            return logs
        return {**logs, "multigrid/multiplier": float(self.rate.grid.segment(step).base.multiplier)}


class GridRate:
    """From a step of the grid schedule to the factor of the peak learning rate.

    A `Stepwise` schedule becomes the paper's table: the factor of the stage times the multiplier of the shape, the
    fine-tuning cut in two halves, the first of which keeps the rate of the stage before. Any other schedule is read at
    the step of the plain run that has got as far in the same stage, and multiplied likewise.

    Args:
        grid: the grid schedule.
        schedule: of the plain run.
        peak: learning rate.
        scaling: of the multiplier.

    Raises:
        SettingsError: boundaries of the two schedules differ, or the warm-up is longer than the first shape.
    """

    def __init__(self, grid: GridSchedule, schedule: Schedule, peak: float, scaling: Scaling = "linear") -> None:
        self.grid, self.schedule, self.peak, self.scaling = grid, schedule, peak, scaling
        self.plain = grid.plain_steps
        per_epoch = grid.plan.steps_per_epoch
        self.stages = [round(epoch * per_epoch) for epoch in (0, *grid.plan.stages)]
        if isinstance(schedule, Stepwise):
            self._check_boundaries(schedule)
        first = grid.segments[0]
        self.plain_warmup = count_steps(schedule.warmup, self.plain)
        # As many epochs as the plain run warms up for, in fewer and larger steps.
        self.warmup = round(self.plain_warmup / first.average)
        if self.warmup > first.steps[1]:
            raise SettingsError(
                f"the warm-up of {self.plain_warmup} plain steps takes {self.warmup} here and the first shape has "
                f"{first.steps[1]}: shorten schedule.warmup, for its learning rate is that of one shape"
            )

    def _check_boundaries(self, schedule: Stepwise) -> None:
        falls = [count_steps(boundary, self.plain) for boundary in schedule.boundaries]
        if len(falls) != len(self.stages) - 1 or any(
            abs(a - b) > 1 for a, b in zip(falls, self.stages[1:], strict=True)
        ):
            raise SettingsError(
                f"schedule.boundaries are steps {falls} of the plain run's {self.plain}, source.stages begin at "
                f"{self.stages[1:]}: they should be the same"
            )

    def multiplier(self, segment: Segment) -> float:
        """Of the learning rate in a segment."""
        value = float(segment.base.multiplier)
        match self.scaling:
            case "linear":
                return value
            case "sqrt":
                return math.sqrt(value)
            case "none":
                return 1.0

    def __call__(self, step: int) -> float:
        """The factor of step `step`."""
        if step < self.warmup:
            return (step + 1) / self.warmup * self._after_warmup(self.warmup - 1)
        return self._after_warmup(step)

    def _after_warmup(self, step: int) -> float:
        segment = self.grid.segment(step)
        factor = self._stage(step, segment) if isinstance(self.schedule, Stepwise) else self._position(step, segment)
        return factor * self.multiplier(segment)

    def _stage(self, step: int, segment: Segment) -> float:
        assert isinstance(self.schedule, Stepwise)
        stage, (start, stop) = segment.stage, segment.steps
        last = segment is self.grid.segments[-1]
        if last and self.grid.plan.long_cycle and step < (start + stop) // 2:
            stage -= 1
        return self.schedule.stage_factor(stage, self.peak)

    def _position(self, step: int, segment: Segment) -> float:
        """The plain schedule at the same part, by epochs, of the same stage."""
        first, last = self.stage_epochs(segment.stage)
        (start, stop), (begin, end) = segment.steps, segment.epochs
        done = begin + (end - begin) * min(step - start, stop - start) / (stop - start)
        bounds = [*self.stages, self.plain]
        low, high = bounds[segment.stage], bounds[segment.stage + 1]
        place = low + (high - low) * (done - first) / (last - first)
        return self.schedule.factor(max(round(place), self.plain_warmup), self.plain, self.peak)

    def stage_epochs(self, stage: int) -> tuple[int, int]:
        """Where a stage begins and ends, in epochs of the grid schedule."""
        mine = [segment.epochs for segment in self.grid.segments if segment.stage == stage]
        return mine[0][0], mine[-1][1]
