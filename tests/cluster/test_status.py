"""What `resilin cluster status` is told of every worker."""

from __future__ import annotations

import pytest

from resilin.cluster.changes import first_view
from resilin.cluster.protocol.coordinator import Coordinator
from resilin.cluster.protocol.messages import Beat, Hello, Ready, Warm
from resilin.cluster.protocol.rules import Rules
from resilin.cluster.status import status_of
from resilin.cluster.step_cut import StepCut
from resilin.dashboard.cluster_map import map_of_view

COSTS = (1.0, 1.0, 1.0, 1.0, 0.0)


def told(stages: int, micros: int, micro: int, slots: int) -> tuple[Coordinator, dict]:
    coordinator = Coordinator(Rules(members=4, stages=stages, micros=micros, micro=micro, slots=slots))
    for number in range(4):
        coordinator.told(number, Hello("here"), 0.0)
        coordinator.told(number, Warm(COSTS if stages > 1 else ()), 0.0)
    view = coordinator._next
    assert view is not None
    for number in view.members:
        coordinator.told(number, Beat(7, "", "forward", (), 0.5, ""), 0.0)
        coordinator.told(number, Ready(view.epoch, view.digest, str(view.stage_of(number))), 0.0)
    coordinator.told(9, Hello("there"), 0.0)
    return coordinator, status_of(coordinator, {0: "process 17", 9: "process 18", 11: "awaited"})


def test_each_member_has_its_stage_layers_slots_and_incarnation():
    _, status = told(stages=2, micros=5, micro=2, slots=9)
    rows = {one["number"]: one for one in status["members"]}
    assert {n: (one["stage"], one["layers"], one["slots"]) for n, one in rows.items()} == {
        0: (0, [0, 2], [0, 1, 2, 3, 4, 5]), 1: (0, [0, 2], [6, 7, 8]),
        2: (1, [2, 4], [0, 1, 2, 3, 4, 5]), 3: (1, [2, 4], [6, 7, 8]),
        9: (None, None, None), 11: (None, None, None),
    }  # fmt: skip
    assert all(one["incarnation"] == number for number, one in rows.items())
    assert [rows[number]["state"] for number in (0, 9, 11)] == ["in", "starting", "awaited"]


def test_without_stages_everyone_has_all_layers():
    _, status = told(stages=1, micros=4, micro=1, slots=4)
    assert [(one["stage"], one["layers"], one["slots"]) for one in status["members"][:4]] == [
        (0, None, [number]) for number in range(4)
    ]


@pytest.mark.parametrize("micros", [1, 3, 4, 7])
def test_it_is_what_the_page_shows(micros: int):
    coordinator, status = told(stages=2, micros=micros, micro=1, slots=micros)
    assert coordinator.view is not None
    shown = map_of_view(coordinator.view.json(), status, StepCut(micros, 1))
    for place, stage in enumerate(shown["stages"]):
        for cell in stage["members"]:
            one = next(one for one in status["members"] if one["number"] == cell["number"])
            first, end = one["micros"]
            assert (one["stage"], one["layers"]) == (place, stage["layers"])
            assert cell["micros"] == ([first, end - 1] if end > first else None)


def test_where_micro_batches_are_cut_for_whoever_is_there_their_slots_are_shown():
    view = first_view(range(3), dict.fromkeys(range(3), "here"), 1, (), 1, 1, 3, 6)
    assert StepCut(8, 2, exact=False).of(view)[0] == [
        [range(2), range(2, 3)], [range(3, 5), range(5, 6)], [range(6, 7), range(7, 8)],
    ]  # fmt: skip
    view = first_view(range(3), dict.fromkeys(range(3), "here"), 2, (0, 1, 2), 1, 1, 2, 6)
    assert StepCut(8, 2, exact=False).of(view) == [  # each tick of two slots is shared
        [[range(1), range(2, 3), range(4, 5), range(6, 7)], [range(1, 2), range(3, 4), range(5, 6), range(7, 8)]],
        [[range(2), range(2, 4), range(4, 6), range(6, 8)]],
    ]
    assert StepCut(8, 2, exact=False).counts(view) == [[(0, 4), (4, 8)], [(0, 4)]]
