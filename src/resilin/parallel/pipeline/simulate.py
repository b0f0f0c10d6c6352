"""When each action of a schedule would run, for given costs: an event simulation, exact in exact numbers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from resilin.parallel.pipeline.errors import ScheduleError
from resilin.parallel.pipeline.replay import replay
from resilin.parallel.pipeline.schedule import Action, F, Kind, Schedule, W
from resilin.parallel.pipeline.timeline import Record, Time, Timeline

PerStage = Time | Sequence[Time]
"""One time for all stages, or one for each."""


@dataclass(frozen=True, slots=True)
class Costs:
    """How long actions take.

    Each is one time for all stages or one for each; with several stages on a rank, the time of one stage. `B` is the
    sum of `I` and `W` unless `backward` says otherwise.

    Attributes:
        forward: of F.
        input: of I.
        weight: of W.
        backward: of B; None is `input + weight`.
        micro: how many times as long each micro-batch takes; empty: all alike.
    """

    forward: PerStage = 1
    input: PerStage = 1
    weight: PerStage = 1
    backward: PerStage | None = None
    micro: Sequence[Time] = ()

    def compute(self, stages: int, micros: int) -> Callable[[Action], Time]:
        """The time of an action.

        Raises:
            ScheduleError: a list is shorter than the stages or micro-batches.
        """
        inputs, weights = each_stage("input", self.input, stages), each_stage("weight", self.weight, stages)
        if self.backward is None:
            whole = [i + w for i, w in zip(inputs, weights, strict=True)]
        else:
            whole = each_stage("backward", self.backward, stages)
        table = {
            Kind.F: each_stage("forward", self.forward, stages),
            Kind.B: whole,
            Kind.I: inputs,
            Kind.W: weights,
        }
        if not self.micro:
            return lambda action: table[action.kind][action.stage]
        if len(self.micro) != micros:
            raise ScheduleError(f"costs name {len(self.micro)} micro-batches; the schedule has {micros}")
        scale = self.micro
        return lambda action: table[action.kind][action.stage] * scale[action.micro]


def each_stage(name: str, cost: PerStage, count: int) -> list[Time]:
    """The list of a cost given as one time for all or as one for each, of just the length that is needed."""
    if not isinstance(cost, Sequence):
        return [cost] * count
    if len(cost) != count:
        raise ScheduleError(f"{name} costs are {len(cost)} times; {count} are needed, or a single one for all")
    return list(cost)


def simulate(schedule: Schedule, costs: Costs | Callable[[Action], Time] = Costs(), transfer: PerStage = 0) -> Timeline:
    """When each action runs if every rank does its own as soon as it can, in its order.

    A transfer begins when its action is done and delays nobody but its receiver: transfers overlap with computing and
    with each other. Takes time in proportion to the actions.

    Args:
        schedule: any that does not deadlock.
        costs: per stage, or the time of any action. By default F, I and W take 1, B 2.
        transfer: from stage `s` to `s + 1`, and back, where they are on two ranks: one time, or one for each `s`.

    Raises:
        ScheduleError: costs do not fit, or the schedule deadlocks.
    """
    stages, micros, rank_of = schedule.stages, schedule.micros, schedule.rank_of
    compute = costs.compute(stages, micros) if isinstance(costs, Costs) else costs
    between = each_stage("transfer", transfer, stages - 1)
    hop = [time if rank_of[s] != rank_of[s + 1] else 0 for s, time in enumerate(between)]
    forward: list[Time] = [0] * (stages * micros)  # ends, by stage * micros + micro
    back: list[Time] = [0] * (stages * micros)
    free: list[Time] = [0] * schedule.ranks
    records = []
    for rank, action in replay(schedule):
        stage, start = action.stage, free[rank]
        cell = stage * micros + action.micro
        if action.kind is F:
            if stage:
                start = max(start, forward[cell - micros] + hop[stage - 1])
            free[rank] = forward[cell] = start + compute(action)
        elif action.kind is W:
            free[rank] = start + compute(action)
        else:
            if stage < stages - 1:
                start = max(start, back[cell + micros] + hop[stage])
            free[rank] = back[cell] = start + compute(action)
        records.append(Record(action, rank, start, free[rank]))
    return Timeline(tuple(records), schedule.ranks)
