"""The frequency axis: what is left of an imbalance is taken up by a higher clock of the slow stages (ElasWave, DVFS).

A plan, never an act: nothing here touches a device. Who wants the clocks to be set names a function that is handed them
(`resilin.cluster.axes.hook`).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from resilin.parallel.pipeline import Time


@dataclass(frozen=True, slots=True)
class StageTime:
    """How long a stage takes for one tick of the pipeline, at the usual clock.

    Attributes:
        compute: the part that a higher clock shortens.
        memory: the part that waits for memory, whatever the clock.
    """

    compute: Time
    memory: Time = 0

    def at(self, clock: Time, base: Time) -> Time:
        """`compute * base / clock + memory`."""
        return self.compute * base / clock + self.memory


@dataclass(frozen=True, slots=True)
class Clocks:
    """What a device can be set to.

    Attributes:
        table: the clocks there are, of any unit.
        base: the usual one; of the table.
        memory: the share of a stage's time, at the usual clock, that no clock shortens.
        lower: whether fast stages may be slowed down to what is needed, to save power.
    """

    table: tuple[Time, ...]
    base: Time
    memory: Time = 0
    lower: bool = False

    def __post_init__(self) -> None:
        if self.base not in self.table or min(self.table) <= 0:
            raise ValueError(f"clocks are positive, and the usual one ({self.base}) is one of them: {list(self.table)}")
        if not 0 <= self.memory <= 1:
            raise ValueError(f"the share of the time that no clock shortens is between 0 and 1, not {self.memory}")

    def stage(self, seconds: Time) -> StageTime:
        """A stage that takes so long at the usual clock."""
        return StageTime(seconds * (1 - self.memory), seconds * self.memory)

    def factor(self, clock: Time) -> Time:
        """By what a stage's time is multiplied at a clock."""
        return self.stage(1).at(clock, self.base)


def absorb(stages: Sequence[StageTime], slow: Collection[int], clocks: Clocks) -> tuple[Time, ...]:
    """A clock for each stage.

    The target is the largest time among the stages that are not slow. A slow stage above it gets the smallest clock
    that reaches it, else the highest there is; with `clocks.lower`, all others get the smallest that does.

    Args:
        stages: their times for one tick, with what they have to compute now.
        slow: those that lost replicas, whose clock may be raised. If that is all of them, there is no bubble to use.
        clocks: of the devices.

    Returns:
        (P,) clocks out of the table; the usual one wherever nothing is to be gained.
    """
    others = [stage.at(clocks.base, clocks.base) for number, stage in enumerate(stages) if number not in slow]
    if not others:
        return (clocks.base,) * len(stages)
    target = max(others)
    found = []
    for number, stage in enumerate(stages):
        reach = [clock for clock in sorted(clocks.table) if stage.at(clock, clocks.base) <= target]
        above = stage.at(clocks.base, clocks.base) > target
        if above and number in slow:
            found.append(reach[0] if reach else max(clocks.table))
        else:
            found.append(reach[0] if clocks.lower and reach else clocks.base)
    return tuple(found)
