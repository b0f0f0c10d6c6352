"""Who is cut off: of members that do not all reach each other, those without whom the others do. Pure.

A probe is asked of all members of a view at once, when a connection between two that are both alive has ended, or when
nobody has begun anything new for long. The coordinator reaches all of them; it is they who may not reach each other.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field


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
