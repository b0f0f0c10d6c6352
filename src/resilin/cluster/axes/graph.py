"""The graph axis: layers move between stages until the slowest is the quickest it can be (ElasWave, section 3)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from resilin.cluster.axes.layers import Layers, Machine
from resilin.cluster.axes.pipeline import Pipeline
from resilin.parallel.pipeline import ScheduleError, Split, Time, balanced


@dataclass(frozen=True, slots=True)
class Moves:
    """Layers that change their stage.

    Attributes:
        layers: (layer, from, to), ascending.
        seconds: that it takes to move them.
    """

    layers: tuple[tuple[int, int, int], ...]
    seconds: float


@dataclass(frozen=True, slots=True)
class Repartition:
    """The best split of the layers, beside the present one.

    Attributes:
        split: the best.
        now: (P,) seconds of a tick at each stage, as layers are now.
        new: and as they would be.
        moves: from here to there.
        fits: whether the present split fits into memory, estimated as the new one was.
    """

    split: Split
    now: tuple[Time, ...]
    new: tuple[Time, ...]
    moves: Moves
    fits: bool


def repartition(pipeline: Pipeline, layers: Layers, machine: Machine) -> Repartition | None:
    """The split that minimises the largest `load of a stage * cost of its layers`, moving as few as possible.

    A stage that has lost replicas has more slots for each, so it should have fewer layers. Memory is what 1F1B holds.
    See `resilin.parallel.pipeline.balanced` for how equal optima are told apart.

    Args:
        pipeline: with the tables after the change.
        layers: their costs.
        machine: its memory, and how quickly layers move.

    Returns:
        None where no split fits into memory.
    """
    split, loads = pipeline.split, pipeline.loads()
    counts = [len(table.replicas) for table in pipeline.tables]
    flights = [min(split.stages - stage, pipeline.ticks) * load for stage, load in enumerate(loads)]

    def allowed(stage: int, first: int, end: int) -> bool:
        if machine.memory is None:
            return end > first
        return end > first and layers.held(first, end, counts[stage], flights[stage]) <= machine.memory

    try:
        found = balanced(layers.seconds, split.stages, layers.embedding, layers.head, loads, allowed, split)
    except ScheduleError:
        return None
    return Repartition(
        found,
        _ticks(split, layers, loads),
        _ticks(found, layers, loads),
        moves(split, found, layers, machine, counts),
        all(allowed(stage, split.bounds[stage], split.bounds[stage + 1]) for stage in range(split.stages)),
    )


def moves(before: Split, after: Split, layers: Layers, machine: Machine, replicas: Sequence[int]) -> Moves:
    """What moves, and how long the busiest member sends or receives.

    Every parameter is cut in equal slices, so all members of a stage send a slice each, over links of their own
    (ElasWave, section 6): a layer's states go once, its weights to every replica of the stage that gets it.
    """
    changed = tuple(
        (layer, before.stage_of(layer), after.stage_of(layer))
        for layer in range(before.layers)
        if before.stage_of(layer) != after.stage_of(layer)
    )
    if not changed or machine.bandwidth is None:
        return Moves(changed, machine.setup if changed else 0.0)
    out, into = [0.0] * len(replicas), [0.0] * len(replicas)
    for layer, source, target in changed:
        weights = layers.weights[layer] if layers.weights else 0.0
        states = layers.states[layer] if layers.states else 0.0
        out[source] += (weights * replicas[target] + states) / replicas[source]
        into[target] += weights + states / replicas[target]
    return Moves(changed, machine.setup + max(*out, *into) / machine.bandwidth)


def _ticks(split: Split, layers: Layers, loads: Sequence[Time]) -> tuple[Time, ...]:
    return tuple(load * cost for load, cost in zip(loads, layers.of_stages(split), strict=True))
