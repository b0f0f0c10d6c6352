"""Who is cut off: of members that do not all reach each other, those without whom the others do. Pure.

A probe is asked of all members of a view at once, when a connection between two that are both alive has ended, or when
nobody has begun anything new for long. The coordinator reaches all of them; it is they who may not reach each other.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from resilin.cluster.protocol.effects import Effect, Tell
from resilin.cluster.protocol.messages import Probe, Probed

_ANSWER = 3  # times the silence, within which a probe is answered
_LONGEST = 64  # times the silence, between two probes of members that only take their time


@dataclass
class Round:
    """A probe under way.

    Attributes:
        number: of it.
        asked: members.
        begun: when, seconds.
        answers: by member those that it does not reach.
    """

    number: int
    asked: tuple[int, ...]
    begun: float
    answers: dict[int, tuple[int, ...]] = field(default_factory=dict)


class Probing:
    """One probe at a time, and when the next one may be asked.

    Args:
        silence: seconds in which nobody begins anything new before it is asked who reaches whom.
    """

    def __init__(self, silence: float) -> None:
        self._silence = self._wait = silence  # seconds between two probes while nothing new is begun
        self._round: Round | None = None
        self._rounds = 0
        self._quiet_until = 0.0  # before that it need not be asked again

    def ask(self, members: Iterable[int], now: float) -> list[Effect]:
        """Ask all of these, unless a probe is under way."""
        if self._round is not None:
            return []
        self._rounds += 1
        asked = self._round = Round(self._rounds, tuple(members), now)
        return [Tell(number, Probe(asked.number, asked.asked)) for number in asked.asked]

    def answered(self, member: int, told: Probed) -> bool:
        """Whether this answers the probe that is under way."""
        here = self._round is not None and told.number == self._round.number
        if here and self._round is not None:
            self._round.answers[member] = told.lacking
        return here

    @property
    def asking(self) -> bool:
        """Whether a probe is under way."""
        return self._round is not None

    def overdue(self, now: float) -> bool:
        """Whether it has been for longer than anybody needs to answer."""
        return self._round is not None and now - self._round.begun > _ANSWER * self._silence

    def may_ask(self, now: float) -> bool:
        """Whether it is time to ask again."""
        return self._round is None and now >= self._quiet_until

    def verdict(self, members: Collection[int], late: bool) -> list[tuple[int, str]] | None:
        """Whom to go on without, and why, which ends the probe; None: there is none, or somebody has not told yet.

        Args:
            members: those who are still there.
            late: who has not told by now is not waited for, and goes.
        """
        asked = self._round
        if asked is None:
            return None
        there = [number for number in asked.asked if number in members]
        missing = [number for number in there if number not in asked.answers]
        if missing and not late:
            return None
        self._round = None
        gone = [(number, "did not tell whom it reaches") for number in missing]
        for number, others in cut_off([n for n in there if n not in missing], asked.answers):
            gone.append((number, f"is cut off from member {', '.join(map(str, others))}"))
        return gone

    def new_begun(self) -> None:
        """Something new was begun: the next probe is asked as early as the first."""
        self._wait = self._silence

    def all_take_their_time(self, now: float) -> None:
        """All reach each other, and nothing new is begun: the next probe is asked later than the last."""
        self._wait = min(2 * self._wait, _LONGEST * self._silence)
        self._quiet_until = now + self._wait


def cut_off(members: Sequence[int], lacking: Mapping[int, Collection[int]]) -> list[tuple[int, list[int]]]:
    """The members to go on without, and for each whom it is apart from.

    Two members are apart if either does not reach the other. Whoever is apart from most goes first (the side with
    fewer members), of equals the one with the highest number, until all who are left reach each other.

    Args:
        members: all of them.
        lacking: by member those that it does not reach.
    """
    apart: dict[int, set[int]] = {number: set() for number in members}
    for one, others in lacking.items():
        for other in others:
            if one in apart and other in apart and one != other:
                apart[one].add(other)
                apart[other].add(one)
    found = []
    while any(apart.values()):
        worst = max(apart, key=lambda number: (len(apart[number]), number))
        found.append((worst, sorted(apart.pop(worst))))
        for others in apart.values():
            others.discard(worst)
    return found
