"""Blocks that change their stage in the middle of a step: which gradients go from whom to whom. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from resilin.cluster.view_blueprint import ViewBlueprint
from resilin.parallel.handing import Moved
from resilin.parallel.stretches import blocks_in


def moved_between(before: ViewBlueprint, after: ViewBlueprint, kept: Mapping[int, Sequence[int]]) -> list[Moved]:
    """The parameters that another stage has, which has the same members as before.

    Args:
        before: the view in which a step's micro-batches were computed.
        after: the one in which the step is taken.
        kept: by member its micro-batches, all of the step together.
    """
    rank = {number: place for place, number in enumerate(after.view.members)}
    found = []
    for part in range(after.view.tensor):
        old, new = before.owners(part), after.owners(part)
        for stage, each in enumerate(new):
            for number, name in enumerate(each.names):
                if name in old[stage].names:
                    continue
                had = next(one for one in old if name in one.names)
                givers = {rank[member]: blocks_in(kept.get(member, ())) for member in had.members}
                takers = {
                    rank[member]: [(run.begin, run.end) for run in each.ownership.runs_of(number, place)]
                    for place, member in enumerate(each.members)
                }
                found.append(Moved(name, givers, takers, each.ownership.sizes[number]))
    return found
