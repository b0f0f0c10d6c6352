"""A coordinator that is made by its first call."""

from __future__ import annotations

import pytest

from resilin.checkpoint.coordinator import Alone, Coordinator
from resilin.checkpoint.errors import CheckpointError
from resilin.checkpoint.late_coordinator import LateCoordinator


def test_it_is_made_once_and_when_it_is_needed() -> None:
    made: list[Coordinator] = []

    def make() -> Coordinator:
        made.append(Alone())
        return made[-1]

    late = LateCoordinator(0, 1, make)
    assert (late.rank, late.world, made) == (0, 1, [])
    assert late.gather(3) == [3]
    assert late.broadcast({"a": 1}) == {"a": 1}
    assert len(made) == 1


def test_ranks_that_do_not_find_each_other_are_told_of_and_may_try_again() -> None:
    tries: list[int] = []

    def make() -> Coordinator:
        tries.append(1)
        if len(tries) == 1:
            raise RuntimeError("the links of epoch 0 were cut")
        return Alone()

    late = LateCoordinator(1, 2, make)
    with pytest.raises(CheckpointError, match=r"rank 1: .* did not find each other \(the links of epoch 0 were cut\)"):
        late.gather(3)
    assert late.gather(3) == [3]
