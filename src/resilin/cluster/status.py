"""What a job of workers that come and go does, for whoever asks. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from resilin.cluster.protocol.coordinator import Coordinator
from resilin.cluster.protocol.rules import Rules
from resilin.cluster.step_cut import StepCut
from resilin.cluster.view import View

_NOWHERE: dict[str, Any] = {"stage": None, "layers": None, "micros": None, "slots": None}
_NOBODY = {**_NOWHERE, "host": "", "state": "awaited", "step": "", "seconds": 0.0, "holders": []}


def status_of(coordinator: Coordinator, running: Mapping[int, str]) -> dict[str, Any]:
    """As JSON values: phase, epoch, step (of the newest version), and of every worker where and what it is, and does.

    Args:
        coordinator: of the job.
        running: by number, what whoever starts workers says of each: "process 17 at node3".
    """
    view, members = coordinator.view, []
    for number, member in sorted(coordinator.members.items()):
        beat, inside = member.beat, view is not None and number in view.members
        members.append(
            {
                "number": number,
                "host": member.host,
                "process": running.get(number, "").removeprefix("process ").split(" ")[0],
                "state": _state(member.leaving, inside, member.warm),
                "step": beat.step if beat is not None else "",
                "doing": beat.doing if beat is not None else "",
                "seconds": beat.seconds if beat is not None else 0.0,
                "holders": list(view.holders[number]) if view is not None and inside else [],
                "incarnation": number,  # given once and never again
                **(_place(view, number, coordinator.rules) if view is not None and inside else _NOWHERE),
            }
        )
    for number, said in sorted(running.items()):
        if number not in coordinator.members:  # it has not said anything yet
            members.append({**_NOBODY, "number": number, "incarnation": number, "process": "", "doing": said})
    epoch = view.epoch if view is not None else None
    return {"phase": coordinator.phase, "epoch": epoch, "step": coordinator.version, "members": members}


def _place(view: View, number: int, rules: Rules) -> dict[str, Any]:
    """A member's stage, its layers and its micro-batches there as [first, end), and the slots it computes of a step.

    In a step of which some is kept from before a change, they may be others.
    """
    stage = view.stage_of(number)
    team = view.stages[stage].teams.index(view.team_of(number))
    cut = StepCut(rules.slots or rules.micros * rules.micro, rules.micro, not rules.even)
    return {
        "stage": stage,
        "layers": [view.layers[stage], view.layers[stage + 1]] if view.layers else None,
        "micros": list(cut.counts(view)[stage][team]),
        "slots": [slot for micro in cut.of(view)[stage][team] for slot in micro],
    }


def _state(leaving: bool, inside: bool, warm: bool) -> str:
    return "leaving" if leaving else "in" if inside else "warm" if warm else "starting"
