"""What a job of workers that come and go does, for whoever asks. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from resilin.cluster.protocol.coordinator import Coordinator
from resilin.cluster.protocol.rules import Rules
from resilin.cluster.view import View
from resilin.parallel.micro_batches import in_runs

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
    """A member's stage, its layers as [first, end), and its micro-batches and slots of a step as [first, end).

    In a step of which some is kept from before a change, they may be others.
    """
    place = view.stage_of(number)
    teams = view.stages[place].teams
    micros = list(in_runs(rules.micros, len(teams))[teams.index(view.team_of(number))])
    dealt = [micros[0], micros[-1] + 1] if micros else [0, 0]
    slots = rules.slots or rules.micros * rules.micro
    return {
        "stage": place,
        "layers": [view.layers[place], view.layers[place + 1]] if view.layers else None,
        "micros": dealt,
        "slots": [min(micro * rules.micro, slots) for micro in dealt],
    }


def _state(leaving: bool, inside: bool, warm: bool) -> str:
    return "leaving" if leaving else "in" if inside else "warm" if warm else "starting"
