"""How long a step takes: the pipeline's own schedule, replayed with what each stage costs and who has what."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from fractions import Fraction

from resilin.cluster.axes.layers import Layers, Machine, numbers
from resilin.cluster.axes.pipeline import Pipeline
from resilin.parallel.pipeline import (
    Costs,
    Kind,
    MemberSchedule,
    ScheduleError,
    Time,
    build,
    follow,
    level,
    simulate_members,
)

MOST_ACTIONS = 4_000  # a second or two for all that is tried of a change; beyond, an estimate stands in


@dataclass(frozen=True, slots=True)
class Step:
    """A step as it would run.

    Attributes:
        seconds: from its first forward to its last backward; in the unit of the layers' costs.
        how: the order that does it: "in step", "level", "level + 1", ...; "estimated" where it is too long to replay.
        schedule: that order.
        held: (P,) the largest number of bytes at a member of each stage.
    """

    seconds: Time
    how: str
    schedule: MemberSchedule | None
    held: tuple[float, ...]


def step_of(
    pipeline: Pipeline, layers: Layers, machine: Machine, clocks: Sequence[Time] = (), more: int = 2
) -> Step | None:
    """The quickest of the orders that members have memory for; None: they have for none.

    Orders are those that the executor has: 1F1B followed in step, where replicas are in step, and `level` with none or
    more activations beyond 1F1B's. The time of a micro-batch is taken to be in proportion to its slots.

    Args:
        pipeline: who has what.
        layers: what that costs.
        machine: memory, messages, and what clocks do.
        clocks: (P,) of each stage; () is the usual one.
        more: up to how many micro-batches a member may hold beyond 1F1B's.
    """
    factors = _factors(pipeline, machine, clocks)
    costs = _costs(pipeline, layers, factors)
    if sum(2 * len(table.micros(one)) for table in pipeline.tables for one in table.replicas) > MOST_ACTIONS:
        return _estimate(pipeline, layers, machine, factors)
    best: Step | None = None
    for how, schedule in _orders(pipeline, costs, more):
        held = _held(pipeline, layers, schedule)
        if machine.memory is not None and max(held) > machine.memory:
            continue
        seconds = simulate_members(schedule, costs, machine.transfer).makespan
        if best is None or seconds < best.seconds:
            best = Step(seconds, how, schedule, held)
    return best


def again(before: Step, pipeline: Pipeline, layers: Layers, machine: Machine, clocks: Sequence[Time]) -> Step:
    """The same order at other clocks."""
    factors = _factors(pipeline, machine, clocks)
    if before.schedule is None:
        return _estimate(pipeline, layers, machine, factors) or before
    timeline = simulate_members(before.schedule, _costs(pipeline, layers, factors), machine.transfer)
    return Step(timeline.makespan, before.how, before.schedule, before.held)


def _factors(pipeline: Pipeline, machine: Machine, clocks: Sequence[Time]) -> list[Time]:
    if not clocks or machine.clocks is None:
        return [1] * len(pipeline.tables)
    return [machine.clocks.factor(clock) for clock in clocks]


def _costs(pipeline: Pipeline, layers: Layers, factors: Sequence[Time]) -> Costs:
    slot = Fraction(1, pipeline.micro)  # so that whole numbers and fractions stay exact
    of_stages = layers.of_stages(pipeline.split)
    of_slot = [seconds * factor * slot for seconds, factor in zip(of_stages, factors, strict=True)]
    forward = [seconds * layers.forward for seconds in of_slot]
    backward = [whole - part for whole, part in zip(of_slot, forward, strict=True)]
    return Costs(forward=forward, backward=backward, input=0, weight=0)


def _orders(pipeline: Pipeline, costs: Costs, more: int) -> Iterator[tuple[str, MemberSchedule]]:
    counts = {len(table.micros(one)) for table in pipeline.tables for one in table.replicas}
    if len(counts) == 1:
        stages = len(pipeline.tables)
        with suppress(ScheduleError):  # as many micro-batches, but not the same slots in them
            yield "in step", follow(build("1f1b", stages, stages, counts.pop()), pipeline.tables)
    for extra in range(more + 1):
        yield f"level + {extra}" if extra else "level", level(pipeline.tables, costs, extra)


def _held(pipeline: Pipeline, layers: Layers, schedule: MemberSchedule) -> tuple[float, ...]:
    """Of each stage, the most bytes that one of its members has at once."""
    most = [0.0] * len(pipeline.tables)
    for number, member in enumerate(schedule.members):
        rows = peak = 0
        for action in schedule.actions[number]:
            if action.kind is Kind.F:
                rows += schedule.rows(number, action.micro)
                peak = max(peak, rows)
            else:
                rows -= schedule.rows(number, action.micro)
        stage = member.rank
        mine = pipeline.split.layers_of(stage)
        held = layers.held(mine.start, mine.stop, len(pipeline.tables[stage].replicas), peak / pipeline.micro)
        most[stage] = max(most[stage], held)
    return tuple(most)


def _estimate(pipeline: Pipeline, layers: Layers, machine: Machine, factors: Sequence[Time]) -> Step | None:
    """The slowest stage's work, and the way there and back of one of its micro-batches through the others."""
    costs = [s * f for s, f in zip(layers.of_stages(pipeline.split), factors, strict=True)]
    work = [load * pipeline.ticks * cost for load, cost in zip(pipeline.loads(), costs, strict=True)]
    ticks = [load * cost for load, cost in zip(pipeline.loads(), costs, strict=True)]
    stages = len(costs)
    held = tuple(
        layers.held(
            pipeline.split.bounds[stage],
            pipeline.split.bounds[stage + 1],
            len(pipeline.tables[stage].replicas),
            min(stages - stage, pipeline.ticks) * pipeline.loads()[stage],
        )
        for stage in range(stages)
    )
    if machine.memory is not None and max(held) > machine.memory:
        return None
    through = max(mine + sum(ticks) - tick for mine, tick in zip(work, ticks, strict=True))
    seconds = through + 2 * machine.transfer * (stages - 1)
    return Step(seconds, "estimated", None, held)


def step_json(step: Step) -> dict[str, object]:
    """As JSON values."""
    return {"seconds": float(step.seconds), "order": step.how, "bytes": numbers(step.held)}
