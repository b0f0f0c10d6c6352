"""What the coordinator knows of stages and blocks while views change: when another division is looked for, and why.

Pure.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from resilin.cluster.division import Better, Division
from resilin.cluster.protocol.effects import Effect, Note, SetClocks
from resilin.cluster.protocol.messages import Committed
from resilin.cluster.protocol.rules import Rules
from resilin.cluster.view import View

_ENOUGH, _MOST = 5, 640  # steps that are counted before it is known what stages take


class Dividing:
    """A division, what it was found with, and what has been decided with it.

    Args:
        rules: of the job.

    Attributes:
        division: by what is known now.
    """

    def __init__(self, rules: Rules) -> None:
        self._rules = rules
        self.division = Division((), rules.layers, rules.micros, clocks=rules.clocks)
        self._clocks: dict[int, float] = {}  # by member, where it is not the usual one
        self._considered: tuple[tuple[int, str], Better | None] = ((-1, ""), None)  # of a view's epoch, costs known so
        self._measured = -1  # the last epoch of whose view it was counted what its stages take
        self._enough = _ENOUGH  # steps of which that is the mean
        self._reasons: list[dict[str, Any]] = []  # of the division that the change under way brings

    def costs(self, told: tuple[float, ...]) -> None:
        """What blocks compute, as the first member that is warm tells."""
        if told and not self.division.costs:
            self.division = replace(self.division, costs=told)

    def layers(self, view: View) -> tuple[int, ...]:
        """The bounds of a first view's stages.

        Raises:
            ScheduleError: there are fewer blocks than stages.
        """
        return self.division.layers([len(stage.teams) for stage in view.stages])

    def better(self, view: View) -> Better | None:
        """See `Division.better`: looked for once in each view, and again when it is known what its stages take."""
        key = view.epoch, self.division.basis + ("" if self._measured != view.epoch else " now")
        if self._considered[0] != key:
            self._considered = key, self.division.better(view)
        return self._considered[1]

    def next(self, view: View, *, may_move: bool, others: bool) -> View:
        """The view that is to be told, divided anew where that is worth it.

        Args:
            view: with the members that there will be.
            may_move: whether nobody waits for a step that was cut short.
            others: whether members have come or gone.
        """
        better = self.division.better(view) if may_move else None
        if better is not None:
            view, self._reasons = better.view, better.reasons
        # Times scatter: without a change of members they have to be known the better, the more often blocks move.
        self._enough = _ENOUGH if others else min(2 * self._enough, _MOST) if better is not None else self._enough
        return view

    def reasons(self, before: View | None, view: View) -> list[dict[str, Any]]:
        """Why a change is as it is; they are told once.

        Args:
            before: the view that has ended, whose states are there; None: all begin.
            view: that all are ready for.
        """
        found, self._reasons = self._reasons, []
        if before is None or found:
            return found
        slots = self._rules.slots or self._rules.micros * self._rules.micro
        return self.division.dataflow(before, view, slots, self._rules.micro, not self._rules.even)

    def measure(self, view: View, committed: Mapping[int, Committed | None]) -> None:
        """Learn what stages take, once in every view, when all of its members have counted for long enough.

        Args:
            view: the present one.
            committed: by member the last of its steps, for those who are there.
        """
        if self._measured == view.epoch or len(view.stages) == 1 or not self.division.costs:
            return
        told = [[committed[number] for number in stage.members if number in committed] for stage in view.stages]
        counted = [[one for one in stage if one is not None and one.epoch == view.epoch] for stage in told]
        if any(not some or len(some) < len(all_) for some, all_ in zip(counted, told, strict=True)):
            return
        if min(one.steps for stage in counted for one in stage) >= self._enough:
            self._measured = view.epoch
            seconds = [statistics.median(one.seconds for one in stage) for stage in counted]
            if min(seconds) > 0:
                self.division = self.division.after(view.layers, seconds)

    def clocks(self, view: View) -> Sequence[Effect]:
        """What is left of an imbalance is taken up by clocks, if they can be set."""
        found = self.division.frequency(view)
        if found is None or self._rules.clocks is None:
            return ()
        clocks, reason = found
        usual = float(self._rules.clocks.base)
        wanted = {n: clock for stage, clock in zip(view.stages, clocks, strict=True) for n in stage.members}
        known, self._clocks = self._clocks, {number: clock for number, clock in wanted.items() if clock != usual}
        if all(known.get(number, usual) == clock for number, clock in wanted.items()):
            return ()
        stages = [
            {"stage": place, "members": list(stage.members), "clock": clock, "usual": usual}
            for place, (stage, clock) in enumerate(zip(view.stages, clocks, strict=True))
        ]
        facts = {"epoch": view.epoch, "stages": stages, "why": reason["why"], "seconds": reason["seconds"]}
        return SetClocks(tuple(stages)), Note("clocks", facts)
