"""Who computes which micro-batches of a step, and which held-out batches, under a view. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache

from resilin.cluster.protocol.messages import Adopt
from resilin.parallel.micro_batches import Dealt, in_runs
from resilin.parallel.stretches import left_to_do

Owners = tuple[tuple[tuple[int, ...], ...], ...]
"""By stage and member, or team of members, ascending numbers."""


def moving(change: Adopt) -> list[int]:
    """The stages that have other members than in the view in which a step was computed."""
    assert change.before is not None
    pairs = zip(change.before.stages, change.view.stages, strict=True)
    return [number for number, (old, new) in enumerate(pairs) if set(old.members) != set(new.members)]


class Dealing:
    """The dealing of one view.

    Runs of neighbours at every stage; a step that is redone leaves everyone what it has finished. Members of a team
    compute the same.

    Args:
        change: that made the view.
    """

    def __init__(self, change: Adopt) -> None:
        self._stages = tuple(stage.leads for stage in change.view.stages)
        self._tensor = change.view.tensor
        kept = {member: tuple(m) for member, m in change.kept.items() if m}
        self._version, self._handed, self._last = change.version, change.handed, 0
        # Who has come from another stage, or was left by some, has given what it kept to those who own it now.
        given = {n for stage in moving(change) for n in change.view.stages[stage].members} if change.handed else set()
        self._kept = {member: mine for member, mine in kept.items() if member not in given}

    def of_step(self, step: int, micros: int) -> list[tuple[int, ...]]:
        """By rank, which of so many micro-batches of a step are whose."""
        self._last = micros
        return [mine for stage in self._owned(step, micros) for mine in stage for _ in range(self._tensor)]

    def together(self, stage: int) -> Dealt:
        """As `of_step`, where all of a stage compute every tick of a step together (`shared_batches`).

        Args:
            stage: whose micro-batches are counted.
        """

        def dealt(step: int, micros: int) -> list[Sequence[int]]:
            if (kept := self._kept_of(step)) or self._is_handed(step):
                return [kept.get(lead, ()) for leads in self._stages for lead in leads for _ in range(self._tensor)]
            ticks = micros // len(self._stages[stage])
            return [
                range(place * ticks, (place + 1) * ticks)
                for leads in self._stages
                for place in range(len(leads))
                for _ in range(self._tensor)
            ]

        return dealt

    def todo(self, step: int) -> Owners:
        """By stage and team, what is left to be computed of the step that `of_step` was asked for last."""
        owned, kept = self._owned(step, self._last), self._kept_of(step)
        return tuple(
            tuple(
                tuple(micro for micro in mine if micro not in kept.get(member, ()))
                for member, mine in zip(members, stage, strict=True)
            )
            for members, stage in zip(self._stages, owned, strict=True)
        )

    def evaluated(self, batches: int) -> Owners:
        """By stage and team, which of so many held-out batches are whose."""
        return _runs(tuple(map(len, self._stages)), batches)

    def _kept_of(self, step: int) -> Mapping[int, Sequence[int]]:
        return self._kept if step == self._version else {}

    def _is_handed(self, step: int) -> bool:
        return self._handed and step == self._version

    def _owned(self, step: int, micros: int) -> Owners:
        kept = self._kept_of(step)
        if self._is_handed(step):  # all of it was computed
            return tuple(tuple(tuple(kept.get(member, ())) for member in members) for members in self._stages)
        if not kept:
            return _runs(tuple(map(len, self._stages)), micros)
        return tuple(
            tuple(map(tuple, left_to_do(micros, [kept.get(member, ()) for member in members])))
            for members in self._stages
        )


@lru_cache(maxsize=8)
def _runs(sizes: tuple[int, ...], count: int) -> Owners:
    return tuple(tuple(map(tuple, in_runs(count, size))) for size in sizes)
