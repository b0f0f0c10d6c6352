"""How members and blocks are divided over the stages of a pipeline, and when that is worth a change. Pure.

A stage's share of a step takes as long as its blocks cost, divided by how many members it has (ElasWave, section 2).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from resilin.cluster.changes import moved
from resilin.cluster.view import View
from resilin.parallel.pipeline.split import Split, balanced


@dataclass(frozen=True, slots=True)
class Division:
    """What the blocks of a model cost.

    Attributes:
        costs: of every block and, last, of the head; in any unit.
        fixed: the blocks of each stage, where they are not to follow the costs.
        horizon: steps within which a new division has to have saved one step's time.
    """

    costs: tuple[float, ...]
    fixed: tuple[int, ...] = ()
    horizon: int = 50

    def layers(self, sizes: Sequence[int], now: Sequence[int] = ()) -> tuple[int, ...]:
        """The bounds of stages of so many members, the slowest of which is as quick as can be.

        Args:
            sizes: members of each stage.
            now: the bounds there are, which stay where that costs nothing.

        Raises:
            ScheduleError: there are fewer blocks than stages.
        """
        if len(sizes) == 1 and not self.costs:
            return ()
        if self.fixed:
            return tuple(sum(self.fixed[:stage]) for stage in range(len(self.fixed) + 1))
        split = balanced(
            self.costs[:-1],
            len(sizes),
            0.0,
            self.costs[-1],
            loads=[1 / size for size in sizes],
            allowed=lambda _, first, end: end > first,
            now=Split(tuple(now)) if now else None,
        )
        return split.bounds

    def slowest(self, view: View) -> float:
        """What a step takes at the stage that takes longest."""
        stages = Split(view.layers).costs(self.costs[:-1], 0.0, self.costs[-1])
        return max(float(cost) / len(stage.members) for cost, stage in zip(stages, view.stages, strict=True))

    def better(self, view: View) -> View | None:
        """The same members with other stages, other blocks or both; None: that is not worth a change."""
        if len(view.stages) == 1 or not self.costs:
            return None
        found = moved(view)
        found = replace(found, layers=self.layers([len(stage.members) for stage in found.stages], view.layers))
        gain = 1 - self.slowest(found) / self.slowest(view)
        return found if gain * self.horizon > 1 else None
