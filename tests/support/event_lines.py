"""Lines of a log, as a run writes them."""

from __future__ import annotations

import json
from typing import Any

from resilin.run.events import Cluster, Event, RunStarted, StepDone, to_json


def line(event: Event) -> bytes:
    """What `JsonlLog` writes of an event."""
    return (json.dumps(to_json(event), allow_nan=False, ensure_ascii=False, separators=(",", ":")) + "\n").encode()


def step(number: int, loss: float = 1.0, *, time: float | None = None, **more: Any) -> StepDone:
    """A step at second 1000 + number, unless a time is given."""
    values: dict[str, Any] = {"lr": 1e-3, "grad_norm": 0.5, "units": 64, "seconds": 0.5, "logs": {"accuracy": 0.25}}
    return StepDone(time=1000.0 + number if time is None else time, step=number, loss=loss, **{**values, **more})


def start(start_step: int = 0, *, time: float = 1000.0, settings: dict[str, Any] | None = None) -> RunStarted:
    """The beginning of a run of a hundred steps."""
    return RunStarted(
        time=time, folder="runs/one", settings=settings or {"name": "one"}, parameters=1000, device="cpu",
        start_step=start_step, total_steps=100,
    )  # fmt: skip


def view(epoch: int, *stages: tuple[int, ...], copies: int = 1) -> dict[str, Any]:
    """A view whose stages' members own equal runs of eight virtual shards."""
    from resilin.cluster.view import Stage, View
    from resilin.layout.dealing import deal

    made = tuple(Stage(members, tuple(members[owner] for owner in deal(8, len(members)))) for members in stages)
    hosts = {number: f"host-{number % 2}" for members in stages for number in members}
    layers = tuple(range(0, 2 * len(stages) + 1, 2)) if len(stages) > 1 else ()
    return View(epoch, made, hosts, layers, copies).json()


def cluster(what: str, *, time: float, **facts: Any) -> Cluster:
    """A decision of the coordinator."""
    return Cluster(time=time, what=what, facts=facts)
