"""All axes together, in their order: dataflow always, layers where it pays, clocks for what is left (ElasWave).

Every decision is told with what it would cost with and without it, as JSON values for a log.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from resilin.cluster.axes.clocks import absorb
from resilin.cluster.axes.dataflow import ASSIGNMENTS, EXACT, Assignment, assign
from resilin.cluster.axes.graph import repartition
from resilin.cluster.axes.layers import Layers, Machine, PlanError, numbers
from resilin.cluster.axes.pipeline import Pipeline
from resilin.cluster.axes.step import Step, again, step_of
from resilin.parallel.pipeline import ScheduleError, Time


@dataclass(frozen=True, slots=True)
class Rules:
    """What may be decided.

    Attributes:
        assignments: ways to deal slots that may be taken; the quickest is. `EXACT` keeps the bits.
        graph: whether layers may move.
        horizon: steps within which a move of layers has to be worth its time.
        more: see `step_of`.
    """

    assignments: tuple[Assignment, ...] = EXACT
    graph: bool = True
    horizon: int = 50
    more: int = 2

    def __post_init__(self) -> None:
        if not self.assignments or (strange := set(self.assignments) - set(ASSIGNMENTS)):
            named = sorted(strange) if self.assignments else "none"
            raise PlanError(f"ways to deal slots are {', '.join(ASSIGNMENTS)}; given is {named}")
        if min(self.horizon, self.more) < 0:
            raise PlanError("a horizon of steps, and activations held besides, cannot be negative")


@dataclass(frozen=True, slots=True)
class Decision:
    """What is to be done.

    Attributes:
        pipeline: from now on.
        clocks: (P,) of each stage's devices; () where none can be set.
        before: a step before the change; None where members had no memory for it as it was given.
        after: a step from now on.
        reasons: one for each axis, as JSON values: `axis`, `decision`, `why`, `seconds` (of a step `before` it was
            decided, and `after`), and what else belongs to it.
    """

    pipeline: Pipeline
    clocks: tuple[Time, ...]
    before: Step | None
    after: Step
    reasons: tuple[dict[str, Any], ...]

    def json(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            "members": [list(stage) for stage in self.pipeline.members],
            "layers": list(self.pipeline.split.bounds),
            "loads": numbers(self.pipeline.loads()),
            "clocks": numbers(self.clocks),
            "seconds": {"before": None if self.before is None else float(self.before.seconds)}
            | {"after": float(self.after.seconds)},
            "reasons": list(self.reasons),
        }


def decide(
    now: Pipeline,
    members: Sequence[Sequence[int]],
    layers: Layers,
    machine: Machine | None = None,
    rules: Rules | None = None,
) -> Decision:
    """The plan for a change of members.

    Args:
        now: the pipeline before it.
        members: of each stage, after it.
        layers: what each layer costs.
        machine: memory, links and clocks; by default nothing is short, and no clock can be set.
        rules: what may be decided; by default what keeps the bits.

    Raises:
        PlanError: members cannot compute a step: too few micro-batches for them, or too little memory however layers
            are split.
    """
    machine, rules = machine or Machine(), rules or Rules()
    before = step_of(now, layers, machine, (), rules.more)
    chosen, step, dataflow = _dataflow(now, members, layers, machine, rules, before)
    reasons = [_random(), dataflow]
    if rules.graph:
        chosen, step, graph = _graph(chosen, step, layers, machine, rules)
        reasons.append(graph)
    if step is None:
        raise PlanError(
            f"no split of {chosen.split.layers} layers over stages of {[len(stage) for stage in members]} members fits "
            f"into {machine.memory:g} bytes: more memory, more members, or smaller micro-batches are needed"
        )
    clocks, step, frequency = _frequency(chosen, step, layers, machine)
    return Decision(chosen, clocks, before, step, (*reasons, frequency))


def _random() -> dict[str, Any]:
    return {
        "axis": "random",
        "decision": "unchanged",
        "why": "random numbers are keyed by (seed, step, slot): who computes a slot does not matter",
    }


def _dataflow(
    now: Pipeline,
    members: Sequence[Sequence[int]],
    layers: Layers,
    machine: Machine,
    rules: Rules,
    before: Step | None,
) -> tuple[Pipeline, Step | None, dict[str, Any]]:
    tried: dict[str, float | None] = {}
    best: tuple[Assignment, Pipeline, Step | None] | None = None
    refused = ""
    for how in rules.assignments:
        try:
            pipeline = replace(now, tables=assign(now, members, how))
        except ScheduleError as error:
            refused = str(error)
            continue
        step = step_of(pipeline, layers, machine, (), rules.more)
        tried[how] = None if step is None else float(step.seconds)
        known = best[2] if best is not None else None
        if best is None or (step is not None and (known is None or step.seconds < known.seconds)):
            best = how, pipeline, step
    if best is None:
        raise PlanError(f"a step cannot be dealt to members {[list(stage) for stage in members]}: {refused}")
    how, pipeline, step = best
    fair = "no member has memory for it before layers move" if step is None else "the quickest of those allowed"
    reason = {
        "axis": "dataflow",
        "decision": how,
        "why": f"{fair}; {_SAID[how]}",
        "seconds": {"before": None if before is None else float(before.seconds), "after": tried[how]},
        "tried": tried,
        "loads": numbers(pipeline.loads()),
        "order": None if step is None else step.how,
    }
    return pipeline, step, reason


_SAID: dict[Assignment, str] = {
    "whole": "survivors keep their micro-batches, orphans move whole to who has least: the same bits",
    "runs": "micro-batches are dealt anew in runs of neighbours: the same bits",
    "reshape": "orphans are cut and join the survivors' micro-batches: no more ticks, equal to rounding",
    "turns": "every tick is shared by all replicas of a stage: no more ticks, equal to rounding",
}


def _graph(
    pipeline: Pipeline, step: Step | None, layers: Layers, machine: Machine, rules: Rules
) -> tuple[Pipeline, Step | None, dict[str, Any]]:
    found = repartition(pipeline, layers, machine)
    reason: dict[str, Any] = {"axis": "graph", "horizon": rules.horizon}
    seconds = None if step is None else float(step.seconds)
    if found is None:
        said = {"decision": "keep", "why": "no other split fits into memory", "seconds": {"before": seconds}}
        return pipeline, step, reason | said | {"moved": []}
    other = replace(pipeline, split=found.split)
    new = step_of(other, layers, machine, (), rules.more)
    reason |= {
        "layers": list(found.split.bounds),
        "moved": [list(move) for move in found.moves.layers],
        "move_seconds": found.moves.seconds,
        "slowest": {"before": float(max(found.now)), "after": float(max(found.new))},
        "seconds": {"before": seconds, "after": None if new is None else float(new.seconds)},
    }
    if not found.moves.layers:
        return pipeline, step, reason | {"decision": "keep", "why": "no split has a quicker slowest stage"}
    if new is None:
        return pipeline, step, reason | {"decision": "keep", "why": "its activations do not fit into memory"}
    if step is None:
        return other, new, reason | {"decision": "move", "why": "as layers are, they do not fit into memory"}
    gain = float(step.seconds - new.seconds) * rules.horizon
    worth = f"{rules.horizon} steps gain {gain:.4g} and moving takes {found.moves.seconds:.4g}"
    if gain > found.moves.seconds:
        return other, new, reason | {"decision": "move", "why": worth}
    return pipeline, step, reason | {"decision": "keep", "why": worth}


def _frequency(
    pipeline: Pipeline, step: Step, layers: Layers, machine: Machine
) -> tuple[tuple[Time, ...], Step, dict[str, Any]]:
    seconds = float(step.seconds)
    reason: dict[str, Any] = {"axis": "frequency", "clocks": []}
    if machine.clocks is None:
        said = {"decision": "keep", "why": "no clocks were named that can be set", "seconds": {"before": seconds}}
        return (), step, reason | said
    loads = pipeline.loads()
    slow = [stage for stage, load in enumerate(loads) if load > min(loads)]
    ticks = [
        machine.clocks.stage(load * cost) for load, cost in zip(loads, layers.of_stages(pipeline.split), strict=True)
    ]
    clocks = absorb(ticks, slow, machine.clocks)
    if set(clocks) == {machine.clocks.base}:
        said = {"decision": "keep", "why": "no stage that lost members is slower than the slowest of the others"}
        return (
            clocks,
            step,
            reason | said | {"clocks": numbers(clocks), "seconds": {"before": seconds, "after": seconds}},
        )
    new = again(step, pipeline, layers, machine, clocks)
    raised = [str(stage) for stage, clock in enumerate(clocks) if clock > machine.clocks.base]
    lowered = [str(stage) for stage, clock in enumerate(clocks) if clock < machine.clocks.base]
    parts = [f"{word} at stage {', '.join(which)}" for word, which in (("higher", raised), ("lower", lowered)) if which]
    reason |= {
        "decision": "set",
        "why": f"{' and '.join(parts)}, so that no stage that lost members waits for its clock",
        "clocks": numbers(clocks),
        "seconds": {"before": seconds, "after": float(new.seconds)},
    }
    return clocks, new, reason
