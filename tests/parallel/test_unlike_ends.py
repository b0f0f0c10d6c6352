"""A weight at two stages that are divided in unlike ways: both have the sum, in one order."""

from __future__ import annotations

import pytest
import torch
from forked import run_ranks

from resilin.parallel.degrees import Degrees
from resilin.parallel.ownership import Ownership
from resilin.parallel.unlike_ends import UnlikeEnds
from resilin.parallel.world import World

SIZE = 37
FIRST = Ownership((SIZE,), (0, 1, 1, 0, 0, 1), (None,), 2)
LAST = Ownership((SIZE,), (2, 0, 1, 1, 2, 0), (None,), 3)


def owned() -> list[list[tuple[int, int]]]:
    places = [(FIRST, 0), (FIRST, 1), (LAST, 0), (LAST, 1), (LAST, 2)]
    return [[(run.begin, run.end) for run in which.runs_of(0, place)] for which, place in places]


def agree(rank: int, in_order: bool) -> None:
    first, last = torch.arange(SIZE) + 0.1, torch.arange(SIZE) * 100.0
    ends = UnlikeEnds(World(Degrees(data=5), rank).everyone, 2, owned(), in_order, torch.empty(0))
    assert ends.given is (in_order and rank < 2)
    whole = first if rank < 2 else last
    mine = [torch.zeros(e - b) if ends.given else whole[b:e].clone() for b, e in owned()[rank]]
    ends.agree(mine)
    expected = last if in_order else first + last
    for (begin, end), part in zip(owned()[rank], mine, strict=True):
        assert torch.equal(part, expected[begin:end])


@pytest.mark.parametrize("in_order", [True, False])
def test_both_ends_have_the_sum_of_what_either_had(in_order: bool):
    run_ranks(5, agree, in_order)
