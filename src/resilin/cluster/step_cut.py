"""How a step of an elastic run is cut into micro-batches, and who computes which, for whoever shows it. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from resilin.cluster.view import View
from resilin.parallel.micro_batches import even_batches, in_runs, micro_batches, shared_batches


@dataclass(frozen=True, slots=True)
class StepCut:
    """What decides it, beside the view.

    Attributes:
        slots: of a step; 0: nobody knows.
        micro: the most slots of a micro-batch; 0: nobody knows.
        exact: whether micro-batches are the same whoever computes them.
    """

    slots: int
    micro: int
    exact: bool = True

    def of(self, view: View) -> list[list[list[range]]]:
        """By stage and team the slots of its micro-batches, in a step of which nothing is kept from before a change."""
        teams = [len(stage.teams) for stage in view.stages]
        if not self.slots or not self.micro:
            return [[[] for _ in range(count)] for count in teams]
        if view.expert > 1 and len(teams) > 1:
            cuts = shared_batches(self.slots, self.micro, teams)
        elif self.exact or len(teams) > 1:
            cuts = [micro_batches(self.slots, self.micro, count) for count in teams]
        else:
            cuts = [even_batches(self.slots, self.micro, teams[0], alike=view.expert > 1)]
        return [
            [[cut[number] for number in run] for run in in_runs(len(cut), count)]
            for cut, count in zip(cuts, teams, strict=True)
        ]

    def counts(self, view: View) -> list[list[tuple[int, int]]]:
        """By stage and team the numbers of its micro-batches at that stage, as [first, end)."""
        found = []
        for stage in self.of(view):
            ends = [sum(len(micros) for micros in stage[: place + 1]) for place in range(len(stage))]
            found.append([(end - len(micros), end) for end, micros in zip(ends, stage, strict=True)])
        return found
