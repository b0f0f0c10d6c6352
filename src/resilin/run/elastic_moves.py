"""What changes its owners in the middle of a step: which gradients go from whom to whom. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from resilin.cluster.restore import Owners
from resilin.cluster.view_blueprint import ViewBlueprint
from resilin.parallel.handing import Moved
from resilin.parallel.stretches import blocks_in
from resilin.parallel.unlike_ends import Interval

Blocks = list[tuple[int, int]]


def moved_between(
    before: ViewBlueprint, after: ViewBlueprint, kept: Mapping[int, Sequence[int]], *, whole: bool = False
) -> list[Moved]:
    """The parameters that another stage has, or other members.

    Args:
        before: the view in which a step's micro-batches were computed.
        after: the one in which the step is taken.
        kept: by member its micro-batches, all of the step together.
        whole: whether each has one sum of all of its own, and not blocks of the tree.
    """
    rank = {number: place for place, number in enumerate(after.view.members)}
    found = []
    for part in range(after.view.tensor):
        old, new = before.owners(part), after.owners(part)
        for stage, each in enumerate(new):
            for number, name in enumerate(each.names):
                if name in after.experts:  # see `experts_between`
                    continue
                had = old[stage] if name in old[stage].names else next(one for one in old if name in one.names)
                if had is old[stage] and {*had.members} == {*each.members}:
                    continue
                givers = _givers([(rank[member], kept.get(member, ())) for member in had.members], whole=whole)
                takers = {
                    rank[member]: [(run.begin, run.end) for run in each.ownership.runs_of(number, place)]
                    for place, member in enumerate(each.members)
                }
                found.append(Moved(name, givers, takers, each.ownership.sizes[number]))
    return found


def experts_between(
    before: ViewBlueprint, after: ViewBlueprint, kept: Mapping[int, Sequence[int]]
) -> list[tuple[Moved, dict[int, int]]]:
    """All experts, one by one: who had one has a sum of what it was sent, whoever owns it now gets all of these.

    Args:
        before: the view in which a step's micro-batches were computed.
        after: the one in which the step is taken.
        kept: by member its micro-batches, all of the step together.

    Returns:
        Also by rank that gives which of its own experts it is.
    """
    rank = {number: place for place, number in enumerate(after.view.members)}
    found = []
    for part in range(after.view.tensor):
        old, new = before.all_owners(part), after.all_owners(part)
        for name in [name for name in after.whole.trained if name in after.experts]:
            for expert in range(count := after.specs[name].shape[0]):
                having = [each for each in old if name in each.names and _has(each, expert)]
                places = {rank[member]: _place_of(each, expert) for each in having for member in each.members}
                givers = _givers([(rank[m], kept.get(m, ())) for each in having for m in each.members], whole=True)
                takers, first, size = _taking(new, name, expert, count, rank)
                found.append((Moved(name, givers, takers, size, first), places))
    return found


def _taking(
    owners: Sequence[Owners], name: str, expert: int, count: int, rank: Mapping[int, int]
) -> tuple[dict[int, list[Interval]], dict[int, int], int]:
    """Of one of so many experts: by rank what it owns, and where that begins in all it owns of them; elements."""
    takers, first, size = {}, {}, 0
    for each in owners:
        if name not in each.names or not _has(each, expert):
            continue
        number = each.names.index(name)
        size = each.ownership.sizes[number] // (len(each.experts) or count)
        low = size * _place_of(each, expert)
        for place, member in enumerate(each.members):
            runs = [(run.begin, run.end) for run in each.ownership.runs_of(number, place)]
            cut = [(max(begin, low) - low, min(end, low + size) - low) for begin, end in runs]
            takers[rank[member]] = [(begin, end) for begin, end in cut if begin < end]
            first[rank[member]] = sum(max(0, min(end, low) - begin) for begin, end in runs)
    return takers, first, size


def _givers(had: Sequence[tuple[int, Sequence[int]]], *, whole: bool) -> dict[int, Blocks]:
    """By rank the blocks that it gives a sum of."""
    if not whole:
        return {rank: blocks_in(micros) for rank, micros in had}
    having = [rank for rank, micros in had if len(micros)]
    return {rank: [(place, 0)] for place, rank in enumerate(having)}


def _has(owners: Owners, expert: int) -> bool:
    return not owners.experts or expert in owners.experts


def _place_of(owners: Owners, expert: int) -> int:
    """Among the experts that these members have."""
    return owners.experts.index(expert) if owners.experts else expert
