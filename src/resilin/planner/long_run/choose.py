"""From what a user asks of `resilin plan failures` to a study's settings."""

from __future__ import annotations

import math
from collections.abc import Sequence

from resilin.config import UserError
from resilin.config.settings import closest
from resilin.planner.hardware.find import load_cluster
from resilin.planner.long_run.draw import Failures, MachineFailures
from resilin.planner.long_run.settings import StudySettings


def numbers(option: str, text: str) -> list[float]:
    """Positive numbers with commas between them, ascending.

    Raises:
        UserError: they are none.
    """
    try:
        found = sorted(float(part) for part in text.split(","))
    except ValueError:
        found = [math.nan]
    if not all(value > 0 and math.isfinite(value) for value in found):
        raise UserError(f"{option} {text}: should be positive numbers with commas between them, such as 1,10,100")
    return found


def chosen(settings: StudySettings, names: Sequence[str]) -> StudySettings:
    """Only some of the ways; all where none is named.

    Raises:
        UserError: there is none of such a name.
    """
    if not names:
        return settings
    for name in names:
        if name not in settings.ways:
            near = closest(name, settings.ways)
            hint = f"did you mean {near!r}?" if near else f"there are {', '.join(settings.ways)}"
            raise UserError(f"--way {name}: is none of the study's ways; {hint}")
    return settings.model_copy(update={"ways": {name: settings.ways[name] for name in names}})


def with_machine(settings: StudySettings) -> StudySettings:
    """What the description of a machine says, wherever the study itself says nothing.

    Raises:
        UserError: there is no such description, or its devices do not fit the job.
    """
    if not settings.cluster.machine:
        return settings
    kind = load_cluster(settings.cluster.machine)
    said = settings.cluster.model_fields_set
    changes: dict[str, object] = {} if "devices" in said else {"devices": kind.node}
    if kind.price is not None and "price" not in said:
        changes["price"] = kind.price.device_hour
    if kind.power is not None and not said & {"watts", "idle_watts"}:
        changes |= {"watts": kind.power.busy, "idle_watts": kind.power.idle}
    cluster = settings.cluster.model_copy(update=changes)
    failures, checkpoint = settings.failures, settings.checkpoint
    if kind.failures is not None:
        if failures == Failures() and "failures" not in settings.model_fields_set and settings.trace is None:
            failures = Failures(machine=MachineFailures(mean_hours=kind.failures.device_hours / cluster.devices))
        if "restart_seconds" not in checkpoint.model_fields_set:
            checkpoint = checkpoint.model_copy(update={"restart_seconds": kind.failures.restart})
    if cluster.devices % settings.job.tensor:
        raise UserError(
            f"job.tensor ({settings.job.tensor}) does not divide the {cluster.devices} devices of {kind.name}"
        )
    return settings.model_copy(update={"cluster": cluster, "failures": failures, "checkpoint": checkpoint})
