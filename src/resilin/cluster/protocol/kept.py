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
    found = [mine for each in in_all(alike) for mine in each]
    members = [number for each in view.alike for number in each]
    theirs = {number: tuple(mine) for number, mine in zip(members, found, strict=True) if mine}
    return theirs if parts or all_is_kept(view, theirs, cut_of(halted, version)) else {}


def cut_of(halted: Mapping[int, Halted], version: int) -> tuple[int, int]:
    """Into how many micro-batches the next step was cut, and for how many workers; (0, 0): nobody has any."""
    cuts = {one.cut for one in halted.values() if _of(one, version)}
    return cuts.pop() if len(cuts) == 1 else (0, 0)


def all_is_kept(view: View, kept: Mapping[int, Sequence[int]], cut: tuple[int, int]) -> bool:
    """Whether every stage, and every part of one, has computed all micro-batches of a step.

    Args:
        view: with the members.
        kept: by member its micro-batches.
        cut: of the step, as `cut_of` gives it.
    """
    return cut[0] > 0 and all(sum(len(kept.get(number, ())) for number in alike) == cut[0] for alike in view.alike)


def _of(halted: Halted | None, version: int) -> tuple[int, ...]:
    return halted.kept if halted is not None and halted.step == version else ()
