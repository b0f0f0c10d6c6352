"""Which micro-batches of a step that was cut short need not be computed again. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from resilin.cluster.protocol.messages import Halted
from resilin.cluster.view import View
from resilin.parallel.stretches import in_all


def kept_by(
    before: View, view: View, halted: Mapping[int, Halted], version: int, *, parts: bool = True
) -> dict[int, tuple[int, ...]]:
    """By member, micro-batches of the next step that no stage, and no part of one, has to compute again.

    Args:
        before: the view under which they were computed.
        view: the next one; with other blocks nothing is kept.
        halted: by member what it has said when it came out.
        version: that all go on from.
        parts: whether some of them are of use; else all are kept, or none.
    """
    if before.layers != view.layers:
        return {}
    alike = []
    for old, new in zip(before.stages, view.stages, strict=True):
        for part in range(view.tensor):
            kept = [_of(halted.get(team[part]), version) if team in old.teams else () for team in new.teams]
            if any(count > 1 for count in Counter(micro for mine in kept for micro in mine).values()):
                return {}
            alike.append(kept)
    found = [mine for each in (in_all(alike) if parts else alike) for mine in each]
    members = [number for each in view.alike for number in each]
    theirs = {number: tuple(mine) for number, mine in zip(members, found, strict=True) if mine}
    return theirs if parts or all_is_kept(view, theirs, halted) else {}


def all_is_kept(view: View, kept: Mapping[int, Sequence[int]], halted: Mapping[int, Halted]) -> bool:
    """Whether every stage, and every part of one, has computed all micro-batches of a step.

    Args:
        view: with the members.
        kept: by member its micro-batches.
        halted: by member what it has said, such as how many there are.
    """
    for alike in view.alike:
        having = [number for number in alike if number in kept]
        if {halted[number].cut[0] for number in having} != {sum(len(kept[number]) for number in having)}:
            return False
    return True


def cut_of(before: View, kept: Mapping[int, Sequence[int]], halted: Mapping[int, Halted]) -> tuple[int, ...]:
    """By stage, for how many workers the step was cut of which something is kept; (): nothing is.

    Args:
        before: the view under which it was computed.
        kept: by member its micro-batches.
        halted: by member what it has said.
    """
    if not kept:
        return ()
    return tuple(max((halted[n].cut[1] for n in stage.members if n in kept), default=0) for stage in before.stages)


def _of(halted: Halted | None, version: int) -> tuple[int, ...]:
    return halted.kept if halted is not None and halted.step == version else ()
