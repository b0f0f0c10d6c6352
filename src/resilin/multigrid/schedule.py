"""Which shape a batch has at which step: a pure function of the settings.

Wu, Girshick, He, Feichtenhofer, Kraehenbuehl, "A multigrid method for efficiently training video models", CVPR 2020,
sections 3.2 (long and short cycle) and 3.3; the construction follows the authors' released schedule, which its Kinetics
boundaries test.

An epoch is whatever `steps_per_epoch` says: a pass over the data, or, with 1, a single step of the plain run.
"""

from __future__ import annotations

import bisect
import itertools
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from resilin.vision.grid import Grid


class ScheduleError(ValueError):
    """A schedule that cannot be: the text says which setting to change."""


@dataclass(frozen=True, slots=True)
class Phase:
    """What one step of a cycle has.

    Attributes:
        grid: the shape of its samples.
        multiplier: its samples, in those of the default batch.
    """

    grid: Grid
    multiplier: int


@dataclass(frozen=True, slots=True)
class Segment:
    """Steps of one long-cycle shape.

    Attributes:
        stage: learning-rate stage, from 0; the last one is the fine-tuning.
        base: the long-cycle shape and its multiplier, which the learning rate and batch norm follow.
        phases: what its steps have, in turn: the short cycle, or `base` alone.
        epochs: where it begins and ends, in epochs of this schedule.
        steps: the same in steps.
    """

    stage: int
    base: Phase
    phases: tuple[Phase, ...]
    epochs: tuple[int, int]
    steps: tuple[int, int]

    @property
    def average(self) -> float:
        """Samples of a step, averaged over its phases, in those of the default batch."""
        return statistics.fmean(phase.multiplier for phase in self.phases)


@dataclass(frozen=True, slots=True)
class Plan:
    """What a schedule is made from; see `resilin.multigrid.source:Multigrid` for the settings behind it."""

    full: Grid
    epochs: int
    stages: tuple[int, ...]
    steps_per_epoch: float
    long_cycle: bool = True
    short_cycle: bool = True
    long_factors: tuple[tuple[float, float], ...] = ()
    short_factors: tuple[float, ...] = (0.5, 0.5**0.5)
    epoch_factor: float = 1.5
    finetune_short_cycle: bool = True
    final_shape: Literal["default", "cycle"] = "default"
    evaluations: int = 3
    multiple: int = 1


LONG_FACTORS = ((0.25, 0.5**0.5), (0.5, 0.5**0.5), (0.5, 1.0), (1.0, 1.0))


def default_long_factors(full: Grid) -> tuple[tuple[float, float], ...]:
    """The paper's four shapes, as far as the data have their axes."""
    if full.frames and full.size:
        return LONG_FACTORS
    if full.size:
        return ((1.0, 0.5**0.5), (1.0, 1.0))
    return ((0.25, 1.0), (0.5, 1.0), (1.0, 1.0))


def whole(exact: float, multiple: int) -> int:
    """The nearest whole number, or the nearest multiple (at least one of it)."""
    return round(exact) if multiple == 1 else multiple * max(1, round(exact / multiple))


def scaled(full: Grid, factors: tuple[float, float], multiple: int = 1) -> Grid:
    """The default shape by (frames, size) factors; `multiple` is that of the size, or of the length without one."""
    frames, size = full.frames * factors[0], full.size * factors[1]
    return Grid(round(frames), whole(size, multiple)) if full.size else Grid(whole(frames, multiple))


def _short_sides(plan: Plan, base: Grid) -> list[tuple[Grid, float]]:
    """The shapes of the short cycle and the exact length of the axis that it changes."""
    spatial = bool(plan.full.size)
    full, own = (plan.full.size, base.size) if spatial else (plan.full.frames, base.frames)
    found = []
    for factor in plan.short_factors:
        # No phase is finer than the long cycle's shape (S / sqrt 2 beside a base that was rounded below it).
        exact = min(factor * full, own)
        side = max(1, min(whole(exact, plan.multiple), own))
        exact = exact if plan.multiple == 1 else float(side)
        found.append((Grid(base.frames, side) if spatial else Grid(side), exact))
    return found


def phases_of(plan: Plan, base: Grid, *, short: bool) -> tuple[Phase, ...]:
    """The short cycle over a base shape: S/2, S/sqrt 2, the base; or the base alone."""
    multiplier = max(1, round(plan.full.cost / base.cost))
    found = []
    if short:
        spatial = bool(plan.full.size)
        for grid, exact in _short_sides(plan, base):
            own = base.size if spatial else base.frames
            # round, not floor: at 158 / (224 / sqrt 2) the ratio is 0.995, and a floor would empty the batch.
            more = max(1, round((own / exact) ** (2 if spatial else 1)))
            found.append(Phase(grid, multiplier * more))
    return (*found, Phase(base, multiplier))


def _averages(plan: Plan, bases: Sequence[Grid]) -> list[float]:
    """Samples of a step averaged over the short cycle, from exact sizes, as the construction needs them."""
    found = []
    for base in bases:
        power = 2 if plan.full.size else 1
        fixed = (base.frames or 1) if plan.full.size else 1
        own = base.size if plan.full.size else base.frames
        sides = [exact for _, exact in _short_sides(plan, base)] if plan.short_cycle else []
        found.append(statistics.fmean(max(1, round(plan.full.cost / (fixed * x**power))) for x in (*sides, own)))
    return found


class GridSchedule:
    """Shape, batch and learning-rate multiplier of every step.

    Attributes:
        plan: what it is made from.
        segments: in order, without a gap.
    """

    def __init__(self, plan: Plan) -> None:
        """Raises:
        ScheduleError: naming the setting that does not fit.
        """
        self.plan = plan
        _check(plan)
        self.segments = tuple(_long(plan) if plan.long_cycle else _flat(plan))
        self._ends = [segment.steps[1] for segment in self.segments]

    @property
    def total(self) -> int:
        """Steps of the whole schedule."""
        return self._ends[-1]

    @property
    def epochs(self) -> int:
        """Passes over the data of the whole schedule."""
        return self.segments[-1].epochs[1]

    @property
    def plain_steps(self) -> int:
        """Steps of the plain run it stands for."""
        return round(self.plan.epochs * self.plan.steps_per_epoch)

    def segment(self, step: int) -> Segment:
        """The segment of a step; after the end, the last one."""
        return self.segments[min(bisect.bisect_right(self._ends, step), len(self.segments) - 1)]

    def phase(self, step: int) -> Phase:
        """Shape and batch of a step. The short cycle runs on over the boundaries of the long one."""
        phases = self.segment(step).phases
        return phases[step % len(phases)]

    def samples_before(self, step: int) -> int:
        """Samples (in default batches) of all steps before `step`."""
        index = min(bisect.bisect_right(self._ends, step), len(self.segments) - 1)
        segment = self.segments[index]
        return self._starts[index] + _count(segment.phases, segment.steps[0], step)

    @cached_property
    def _starts(self) -> list[int]:
        counts = [_count(s.phases, s.steps[0], s.steps[1]) for s in self.segments]
        return [0, *itertools.accumulate(counts[:-1])]

    @property
    def cost(self) -> int:
        """B x T x S x S of the whole schedule, in default batches times pixels of a frame."""
        return sum(_count(s.phases, *s.steps, cost=True) for s in self.segments)

    @property
    def plain_cost(self) -> int:
        """The same of the plain run."""
        return self.plain_steps * self.plan.full.cost

    @cached_property
    def milestones(self) -> frozenset[int]:
        """Numbers of steps after which to evaluate and save.

        Every `length // evaluations + 1` epochs, counted back from the end of each shape: its last epoch is always one.
        """
        found = set()
        for segment in self.segments:
            first, last = segment.epochs
            start, stop = segment.steps
            length = last - first
            period = max(length // self.plan.evaluations + 1, 1) if self.plan.evaluations else length
            for epoch in range(last, first, -period):
                found.add(start + round((epoch - first) * (stop - start) / length))
        return frozenset(found)

    def describe(self) -> str:
        """One line for each segment."""
        lines = []
        for s in self.segments:
            phases = ", ".join(f"{p.grid} x{p.multiplier}" for p in s.phases)
            lines.append(f"epochs {s.epochs[0]}-{s.epochs[1]}, steps {s.steps[0]}-{s.steps[1]}: {phases}")
        return "\n".join(lines)


def _count(phases: Sequence[Phase], start: int, stop: int, *, cost: bool = False) -> int:
    """Samples, or samples times their cost, of the steps from `start` to `stop`."""
    each = [p.multiplier * (p.grid.cost if cost else 1) for p in phases]
    whole, rest = divmod(stop - start, len(phases))
    return whole * sum(each) + sum(each[(start + k) % len(phases)] for k in range(rest))


def _check(plan: Plan) -> None:
    if not plan.full.frames and not plan.full.size:
        raise ScheduleError("the source's samples have neither frames nor a size: there is nothing to make coarser")
    if (plan.full.size or plan.full.frames) % plan.multiple:
        raise ScheduleError(
            f"multiple ({plan.multiple}) does not divide the default {'size' if plan.full.size else 'length'} "
            f"({plan.full.size or plan.full.frames}), which every schedule ends with"
        )
    if not plan.stages:
        raise ScheduleError("stages: name at least one epoch at which the learning rate falls (the last shape begins)")
    if list(plan.stages) != sorted(set(plan.stages)) or plan.stages[0] < 1 or plan.stages[-1] >= plan.epochs:
        raise ScheduleError(
            f"stages {list(plan.stages)} should increase, from 1 or later, and end before epochs ({plan.epochs})"
        )
    if any(not 0 < factor <= 1 for factor in plan.short_factors):
        raise ScheduleError(f"short_factors {list(plan.short_factors)} should lie above 0 and be at most 1")
    for pair in plan.long_factors:
        if any(not 0 < factor <= 1 for factor in pair):
            raise ScheduleError(f"long_factors: {list(pair)} should lie above 0 and be at most 1")
        grid = scaled(plan.full, pair, plan.multiple)
        if (plan.full.frames and not grid.frames) or (plan.full.size and not grid.size):
            raise ScheduleError(f"long_factors: {list(pair)} of {plan.full} leaves nothing (it rounds to 0)")


def _long(plan: Plan) -> list[Segment]:
    """The long cycle once in every stage but the last, and then the fine-tuning."""
    bases = [scaled(plan.full, pair, plan.multiple) for pair in plan.long_factors or default_long_factors(plan.full)]
    averages = _averages(plan, bases)
    bounds = (0, *plan.stages)
    rows: list[tuple[int, Grid, float]] = []
    iterations = 0.0
    for stage, (first, last) in enumerate(itertools.pairwise(bounds)):
        for base, average in zip(bases, averages, strict=True):
            epochs = (last - first) * average / sum(averages)
            iterations += epochs / average
            rows.append((stage, base, epochs))
    saving = bounds[-1] / iterations
    final = plan.full if plan.final_shape == "default" else bases[-1]
    final_average = _averages(plan, [final])[0]
    rows.append((len(plan.stages), final, (plan.epochs - bounds[-1]) / saving * final_average))
    stretch = plan.epochs * plan.epoch_factor / sum(epochs for _, _, epochs in rows)
    ends = [round(total * stretch) for total in itertools.accumulate(epochs for _, _, epochs in rows)]
    return _segments(plan, [(stage, base) for stage, base, _ in rows], ends)


def _flat(plan: Plan) -> list[Segment]:
    """Without a long cycle: the stages of the plain run, stretched."""
    ends = [round(end * plan.epoch_factor) for end in (*plan.stages, plan.epochs)]
    return _segments(plan, [(stage, plan.full) for stage in range(len(ends))], ends)


def _segments(plan: Plan, shapes: Sequence[tuple[int, Grid]], ends: Sequence[int]) -> list[Segment]:
    found: list[Segment] = []
    epoch = step = 0
    for index, ((stage, base), end) in enumerate(zip(shapes, ends, strict=True)):
        if end <= epoch:
            raise ScheduleError(
                f"shape {base} of stage {stage} gets no epoch: the run is too short for {len(ends)} shapes; give "
                "epochs and stages in smaller units (steps_per_epoch), or fewer long_factors"
            )
        short = plan.short_cycle and (plan.finetune_short_cycle or index < len(ends) - 1)
        phases = phases_of(plan, base, short=short)
        average = statistics.fmean(phase.multiplier for phase in phases)
        steps = round((end - epoch) * plan.steps_per_epoch / average)
        if not steps:
            raise ScheduleError(
                f"shape {base} of stage {stage} gets no step ({end - epoch} epochs of {plan.steps_per_epoch:g} steps, "
                f"batches {average:.3g} times as large): raise epochs"
            )
        found.append(Segment(stage, phases[-1], phases, (epoch, end), (step, step + steps)))
        epoch, step = end, step + steps
    return found
