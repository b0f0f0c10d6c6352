"""How members and blocks are divided over the stages of a pipeline, and when another division is worth a change. Pure.

Blocks are divided by what they compute until it is known what they take, and then by that. What a division is worth is
found by replaying a step (`resilin.cluster.axes`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from resilin.cluster.axes import Clocks, Layers, Machine, Pipeline, PlanError, Rules, decide, step_of
from resilin.cluster.changes import moved
from resilin.cluster.view import View
from resilin.parallel.pipeline.split import Split, balanced

_WHO = ("members", "teams")
_SCATTER = 0.05  # of a step: so much less it has to take, by times that are measured, which scatter


@dataclass(frozen=True, slots=True)
class Better:
    """Another division of a view's members and blocks.

    Attributes:
        view: with it; its epoch is the one before.
        why: in words.
        reasons: of every axis, as JSON values; times are in steps as they are now.
    """

    view: View
    why: str
    reasons: list[dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Division:
    """What is known of a model and of a step, to divide them.

    Attributes:
        costs: of every block and, last, of the head; in any unit.
        fixed: the blocks of each stage, where they are not to follow the costs.
        micros: micro-batches of a step.
        horizon: steps within which a new division has to have saved what it costs, taken to be one step.
        clocks: that stages can be set to; None: none.
        measured: what blocks and head have taken, in seconds; (): not known yet, then `costs` count.
    """

    costs: tuple[float, ...]
    fixed: tuple[int, ...] = ()
    micros: int = 1
    horizon: int = 50
    clocks: Clocks | None = None
    measured: tuple[float, ...] = ()

    @property
    def basis(self) -> str:
        """Where what blocks cost is known from."""
        return "measured" if self.measured else "by FLOPs"

    def after(self, bounds: Sequence[int], seconds: Sequence[float]) -> Division:
        """With what stages have taken: each one's seconds are shared out over its blocks as these cost until now.

        Args:
            bounds: (P + 1,) of the stages' blocks, when it was measured.
            seconds: (P,) of one micro-batch, forward and backward.
        """
        known = self._known
        split = Split(tuple(bounds))
        cost = split.costs(known[:-1], 0.0, known[-1])
        factors = [took / total if total else 0.0 for took, total in zip(seconds, cost, strict=True)]
        blocks = [known[block] * factors[split.stage_of(block)] for block in range(split.layers)]
        return replace(self, measured=(*blocks, known[-1] * factors[-1]))

    @property
    def _known(self) -> tuple[float, ...]:
        return self.measured or self.costs

    def layers(self, sizes: Sequence[int]) -> tuple[int, ...]:
        """The bounds of stages of so many members, the slowest of which is as quick as can be.

        Raises:
            ScheduleError: there are fewer blocks than stages.
        """
        if len(sizes) == 1 and not self.costs:
            return ()
        if self.fixed:
            return tuple(sum(self.fixed[:stage]) for stage in range(len(self.fixed) + 1))
        return balanced(
            self._known[:-1],
            len(sizes),
            0.0,
            self._known[-1],
            loads=[-(-self.micros // size) for size in sizes],
            allowed=lambda _, first, end: end > first,
        ).bounds

    def better(self, view: View) -> Better | None:
        """The same members with other stages, other blocks or both; None: that is not worth a change."""
        if len(view.stages) == 1 or not self.costs:
            return None
        found = moved(view)
        try:
            now = Pipeline.of(Split(view.layers), [stage.leads for stage in view.stages], self.micros, 1)
            step = step_of(now, self._layers(1.0), Machine())
            if step is None:
                return None
            decision = decide(
                now,
                [stage.leads for stage in found.stages],
                self._layers(float(step.seconds)),
                Machine(setup=1.0),
                Rules(assignments=("runs",), graph=not self.fixed, horizon=self.horizon),
            )
        except PlanError:  # a stage has more members than there are micro-batches
            return None
        found = replace(found, layers=tuple(decision.pipeline.split.bounds))
        takes = float(decision.after.seconds)
        if (1 - takes) * self.horizon <= 1 or (self.measured and takes > 1 - _SCATTER):
            return None
        why = f"{view} become {found}: a step takes {takes:.0%} of the time (blocks {self.basis})"
        return Better(found, why, [{**reason, "costs": self.basis} for reason in decision.reasons])

    def dataflow(self, before: View, after: View, slots: int, micro: int, whole: bool) -> list[dict[str, Any]]:
        """Why work is dealt as it is after a change that moved no blocks, as JSON values; times are in steps before it.

        Args:
            before: the view that has ended.
            after: the next one.
            slots: of a step.
            micro: of a micro-batch.
            whole: whether micro-batches stay what they are; else, without stages, they are cut for the members.
        """
        members = [[stage.leads for stage in view.stages] for view in (before, after)]
        if not whole and len(after.stages) == 1:
            shares = [-(-slots // len(stages[0])) for stages in members]
            cut = -(-shares[1] // micro)
            count = len(members[1][0])
            why = (
                f"{count} {_WHO[after.tensor > 1]} compute {slots // count} to {shares[1]} of {slots} slots, "
                f"in {cut} micro-batches each: equal to rounding"
            )
            seconds = {"before": 1.0, "after": shares[1] / shares[0]}
            return [{"axis": "dataflow", "decision": "even", "why": why, "seconds": seconds}]
        split = Split(before.layers) if before.layers else Split((0, 1))
        layers = self._layers(1.0) if self.costs and before.layers else Layers((1.0,))
        try:
            now = Pipeline.of(split, members[0], self.micros, 1)
            step = step_of(now, layers, Machine())
            if step is None or len(after.stages) != len(before.stages):
                return []
            unit = float(step.seconds)
            layers = self._layers(unit) if self.costs and before.layers else Layers((1.0 / unit,))
            decision = decide(now, members[1], layers, Machine(), Rules(assignments=("runs",), graph=False))
        except PlanError:  # a stage has more members than there are micro-batches
            return []
        return [reason for reason in decision.reasons if reason["axis"] in ("random", "dataflow")]

    def frequency(self, view: View) -> tuple[tuple[float, ...], dict[str, Any]] | None:
        """A clock for each stage of a view, and the reason; None: none can be set, or there are no stages.

        Times are in steps at the usual clock.
        """
        if self.clocks is None or len(view.stages) == 1 or not self.costs:
            return None
        members = [stage.leads for stage in view.stages]
        try:
            now = Pipeline.of(Split(view.layers), members, self.micros, 1)
            step = step_of(now, self._layers(1.0), Machine())
            if step is None:
                return None
            layers, machine = self._layers(float(step.seconds)), Machine(clocks=self.clocks)
            decision = decide(now, members, layers, machine, Rules(assignments=("runs",), graph=False))
        except PlanError:  # a stage has more members than there are micro-batches
            return None
        return tuple(map(float, decision.clocks)), {**decision.reasons[-1], "costs": self.basis}

    def _layers(self, unit: float) -> Layers:
        costs = [cost / unit for cost in self._known]
        return Layers(tuple(costs[:-1]), head=costs[-1])
