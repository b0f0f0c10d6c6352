"""Trajectories of a looped decoder: compositions of L, the steps of the loops in units of 1/L. Pure functions.

LoopFormer (2026) draws a number of loops M < L for each step, and M steps that add up to L.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations, pairwise

from resilin.keys import Keys

Trajectory = tuple[int, ...]


def sequential(keys: Keys, loops: int, whole: int) -> Trajectory:
    """As published: each step is drawn uniformly from what still leaves one unit for each later one.

    Not all compositions are alike: early steps are larger on average.

    Args:
        keys: of the step.
        loops: M, how many steps.
        whole: L, what they add up to.
    """
    steps, left = [], whole
    for number in range(loops - 1):
        step = 1 + keys.fold(number).integer(left - (loops - 1 - number))
        steps.append(step)
        left -= step
    return (*steps, left)


def uniform(keys: Keys, loops: int, whole: int) -> Trajectory:
    """Any composition of `whole` into `loops` steps, all alike; the arguments are those of `sequential`."""
    ends: list[int] = []
    wanted = loops - 1
    for place in range(1, whole):
        if keys.fold(place).integer(whole - place) < wanted - len(ends):
            ends.append(place)
    return tuple(after - before for before, after in pairwise((0, *ends, whole)))


def compositions(loops: int, whole: int) -> Iterator[Trajectory]:
    """All trajectories of so many loops, the coarse-late ones first."""
    for ends in combinations(range(1, whole), loops - 1):
        yield tuple(after - before for before, after in pairwise((0, *ends, whole)))


def label_of(loops: int | Trajectory) -> str:
    """How loops are called in logs and tables: `3`, `4+1+1`."""
    return str(loops) if isinstance(loops, int) else "+".join(map(str, loops))
