"""What a job of workers that come and go does, for whoever asks. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from resilin.cluster.protocol.coordinator import Coordinator

_NOBODY = {"host": "", "state": "awaited", "step": "", "seconds": 0.0, "holders": []}


def status_of(coordinator: Coordinator, running: Mapping[int, str]) -> dict[str, Any]:
    """As JSON values: phase, epoch, step (of the newest version), and of every worker where it is and what it does.

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
            }
        )
    for number, said in sorted(running.items()):
        if number not in coordinator.members:  # it has not said anything yet
            members.append({**_NOBODY, "number": number, "process": "", "doing": said})
    epoch = view.epoch if view is not None else None
    return {"phase": coordinator.phase, "epoch": epoch, "step": coordinator.version, "members": members}


def _state(leaving: bool, inside: bool, warm: bool) -> str:
    return "leaving" if leaving else "in" if inside else "warm" if warm else "starting"
