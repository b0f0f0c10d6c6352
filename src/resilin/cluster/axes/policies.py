"""What each way to live with a loss makes of a step: the whole replica out, orphans re-routed, or the axes' plan."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from resilin.cluster.axes.dataflow import ASSIGNMENTS, EXACT, Assignment
from resilin.cluster.axes.decide import Decision, Rules, decide
from resilin.cluster.axes.layers import Layers, Machine, PlanError
from resilin.cluster.axes.pipeline import Pipeline
from resilin.cluster.axes.step import step_of
from resilin.parallel.pipeline import Time


@dataclass(frozen=True, slots=True)
class Policy:
    """One way to go on.

    Attributes:
        name: of it.
        slots: samples that a step still has.
        seconds: that it takes.
        decision: with its reasons, where one was taken.
    """

    name: str
    slots: int
    seconds: Time
    decision: Decision | None = None

    @property
    def throughput(self) -> Time:
        """Samples a second."""
        return self.slots / self.seconds


INTACT = "nothing lost"
DROPPED = "the whole replica left out"
KEPT = "the whole replica left out, its samples computed by the others"
WHOLE = "orphans re-routed whole"
RESHAPE = "reshape"
GRAPH = "reshape, layers"
ALL = "all axes"


def lose(members: Sequence[Sequence[int]], lost: Mapping[int, Sequence[int]]) -> tuple[tuple[int, ...], ...]:
    """The members of each stage without some.

    Args:
        members: of each stage, by number.
        lost: by stage, which of its replicas, counted from 0.

    Raises:
        PlanError: there is no such stage or replica, or a stage's last one is lost.
    """
    found = []
    for stage, numbers in enumerate(members):
        gone = set(lost.get(stage, ()))
        if strange := [one for one in gone if not 0 <= one < len(numbers)]:
            raise PlanError(f"stage {stage} has replicas 0 to {len(numbers) - 1}, and no {min(strange)}")
        found.append(tuple(number for place, number in enumerate(numbers) if place not in gone))
        if not found[-1]:
            raise PlanError(f"stage {stage} has lost all of its replicas: one of another stage has to move there first")
    if strange := [stage for stage in lost if not 0 <= stage < len(members)]:
        raise PlanError(f"there is no stage {min(strange)}; there are {len(members)}")
    return tuple(found)


def policies(
    now: Pipeline,
    lost: Mapping[int, Sequence[int]],
    layers: Layers,
    machine: Machine | None = None,
    rules: Rules | None = None,
) -> tuple[Policy, ...]:
    """Each way to go on after a loss, from the same pipeline; the first is the step before it.

    Args:
        now: an intact pipeline: every stage with equally many replicas.
        lost: by stage, which of its replicas, counted from 0.
        layers: what each costs.
        machine: memory, links and clocks.
        rules: horizon, and activations held besides; which ways to deal slots are taken is each policy's.

    Raises:
        PlanError: as `lose` and `decide` do, or stages have unequally many replicas.
    """
    machine, rules = machine or Machine(), rules or Rules()
    members = now.members
    if len({len(stage) for stage in members}) > 1:
        counts = [len(stage) for stage in members]
        raise PlanError(f"policies are compared from an intact pipeline; stages have {counts} replicas")
    left = lose(members, lost)
    rows = sorted({replica for replicas in lost.values() for replica in replicas})
    start = step_of(now, layers, machine, (), rules.more)
    if start is None:
        raise PlanError("the pipeline has too little memory for its step before anything is lost")
    found = [Policy(INTACT, now.slots, start.seconds)]
    narrow = [[number for place, number in enumerate(stage) if place not in rows] for stage in members]
    if all(narrow):
        fewer = now.slots - sum(now.tables[0].load(members[0][row]) for row in rows)
        found.append(Policy(DROPPED, fewer, start.seconds))  # every other replica does what it did
        kept = decide(
            now, narrow, layers, replace(machine, clocks=None), replace(rules, assignments=EXACT, graph=False)
        )
        found.append(Policy(KEPT, now.slots, kept.after.seconds, kept))
    cut: tuple[Assignment, ...] = ("reshape", "turns")
    ways: tuple[tuple[str, tuple[Assignment, ...], bool, bool], ...] = (
        (WHOLE, ("whole",), False, False),
        (RESHAPE, cut, False, False),
        (GRAPH, cut, True, False),
        (ALL, ASSIGNMENTS, True, True),
    )
    for name, assignments, graph, clocks in ways:
        own = machine if clocks else replace(machine, clocks=None)
        decision = decide(now, left, layers, own, replace(rules, assignments=assignments, graph=graph))
        found.append(Policy(name, now.slots, decision.after.seconds, decision))
    return tuple(found)
