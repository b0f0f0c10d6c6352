"""The job of a study from a planned layout: steps, stages, replicas and checkpoints as the cost model has them.

A machine holds one part of the pipeline. Where a stage has several machines, whoever is left can share its work, and
all ways to go on are compared. Where every machine holds something that no other one has (few machines, a large
model), nothing goes on without it in this layout: then every number of machines gets the best layout of its own, since
a checkpoint opens in any, and restarts on what is left are compared with waiting.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from resilin.config import UserError, parse_settings
from resilin.config.load import apply_override, read_toml
from resilin.parallel.errors import ParallelError
from resilin.parallel.settings import ParallelSettings
from resilin.planner.cost import Arrangement, Prediction, predict
from resilin.planner.long_run.settings import StudySettings
from resilin.planner.report import short_time
from resilin.planner.search.request import LayoutRequest, Prepared, device_type, prepare, search
from resilin.planner.search.space import Fixed

SAVED = 12
"""Bytes a parameter of a checkpoint: weights and AdamW's moments, float32."""
MOST_SIZES = 8
"""Numbers of machines that are planned anew, from all of them down."""


@dataclass(frozen=True)
class LayoutJob:
    """A study, and what is to be known of it.

    Attributes:
        study: its settings.
        step: the prediction of the layout.
        notes: sentences.
    """

    study: StudySettings
    step: Prediction
    notes: tuple[str, ...]


def study_of_layout(
    file: Path,
    cluster: str,
    overrides: Sequence[str] = (),
    losses_a_day: float | None = None,
    tell: Callable[[str], None] = lambda line: None,
) -> LayoutJob:
    """The study of a run's settings, such as `resilin plan --cluster --write` writes.

    Args:
        file: the settings; every degree of `[parallel]` is said.
        cluster: a machine's name or file.
        overrides: of the study.
        losses_a_day: machines that fail each day, of all together; None: as the machine's file says.
        tell: receives what is being planned.

    Raises:
        UserError: the file cannot be used, or its layout does not fill whole machines.
    """
    raw = read_toml(file)
    workers = _workers(raw, file)
    asked = prepare(LayoutRequest(cluster, workers, None, str(file)))
    steps = raw.get("train", {}).get("steps")
    if not steps:
        raise UserError(f"{file}: how long is the run? say train.steps")
    plan = arrangement_of(raw, file)
    step = _predicted(asked, plan, file)
    node, machines = asked.cluster.node, workers // asked.cluster.node
    if workers % node or not machines:
        raise UserError(
            f"{file}: its {workers} workers do not fill whole machines of {node} devices ({asked.cluster.name}); "
            "failures are of whole machines"
        )
    parts = _parts_of(plan, node, machines)
    notes: list[str] = []
    if parts is not None and machines // parts[0] > 1:
        tree = _shared(asked, step, plan, parts, notes)
    else:
        tree = _planned_anew(asked, step, machines, notes, tell)
    tree["cluster"] |= {"machines": machines, "machine": cluster, "devices": node}
    tree["job"] |= {"step_seconds": step.seconds, "steps": int(steps)}
    if asked.cluster.disk is not None:
        seconds = SAVED * step.parameters() / (workers * asked.cluster.disk.write)
        tree["checkpoint"] = {"seconds": seconds}
        notes.append(f"a checkpoint of {SAVED * step.parameters() / 1e9:,.0f} GB takes {short_time(seconds)}")
    if losses_a_day is not None:
        tree["failures"] = {"machine": {"mean_hours": 24 * machines / losses_a_day}}
    elif asked.cluster.failures is None and not any(one.startswith(("failures.", "trace")) for one in overrides):
        raise UserError(
            f"how often do machines fail? {asked.cluster.name} has no table [failures]: say --losses-a-day, "
            "failures.machine.mean_hours=..., or trace=FILE"
        )
    for override in overrides:
        apply_override(tree, override)
    study = parse_settings(StudySettings, tree, f"the study of {file}")
    return LayoutJob(study, step, tuple(notes))


def arrangement_of(raw: dict[str, Any], file: Path) -> Arrangement:
    """The layout that a settings file has.

    Raises:
        UserError: a setting is not known.
    """
    given = {name: value for name, value in raw.get("parallel", {}).items() if name != "workers"}
    parallel = parse_settings(ParallelSettings, given, f"{file} [parallel]")
    model, train = raw.get("model", {}), raw.get("train", {})
    return Arrangement(
        parallel,
        int(train.get("micro_batch_size") or train.get("batch_size", 1)),
        model.get("recompute", "none"),
        raw.get("precision", {}).get("compute", "fp32"),
        model.get("offload", "none"),
    )


def _workers(raw: dict[str, Any], file: Path) -> int:
    product = 1
    for name in ("data", "tensor", "pipeline", "context", "replicate"):
        value = raw.get("parallel", {}).get(name, 1)
        if not isinstance(value, int):
            raise UserError(f"{file}: parallel.{name} is {value!r}; a layout has every degree as a number")
        product *= value
    return product


def _predicted(asked: Prepared, plan: Arrangement, file: Path) -> Prediction:
    try:
        return predict(asked.work, plan, asked.cluster, device_type=device_type(asked.cluster))
    except ParallelError as error:
        raise UserError(f"{file}: {error}") from None


def _parts_of(plan: Arrangement, node: int, machines: int) -> tuple[int, int] | None:
    """(parts of the pipeline of which a machine holds one, devices that share a replica's part); None: they are not
    whole on machines.
    """
    d = plan.degrees
    each = d.workers // d.pipeline  # devices of a stage
    together = max(node // each, 1)  # stages on one machine
    if d.pipeline % together or (each < node and node % each) or (each > node and each % node):
        return None
    parts, shared = d.pipeline // together, d.tensor * d.context * together
    return (parts, shared) if machines % parts == 0 and node % shared == 0 else None


def _shared(
    asked: Prepared, step: Prediction, plan: Arrangement, parts: tuple[int, int], notes: list[str]
) -> dict[str, Any]:
    """A study in which members of a stage share the work of those that are lost."""
    stages, tensor = parts
    tree: dict[str, Any] = {
        "cluster": {},
        "job": {
            "stages": stages,
            "tensor": tensor,
            "micro_batches": plan.micros(asked.work),
            "micro_batch": plan.micro,
            "layers": asked.work.model.layers,
        },
    }
    if plan.parallel.sharding != "zero1" or plan.degrees.expert > 1 or plan.degrees.context > 1:
        notes.append(
            "ways that go on from memory are what elastic runs with such stages would do: Resilin's own are data, "
            "tensor and pipeline parallelism with zero1"
        )
    return tree


def _planned_anew(
    asked: Prepared, step: Prediction, machines: int, notes: list[str], tell: Callable[[str], None]
) -> dict[str, Any]:
    """A study in which each number of machines has the best layout of its own."""
    measured = {machines: step.seconds}
    for count in range(machines - 1, max(machines - MOST_SIZES, 0), -1):
        found = best_of(asked, count * asked.cluster.node)
        if found is None:
            break
        measured[count] = found.seconds * asked.work.batch / found.work.batch
        tell(f"{count} of {machines} machines: {found.plan}, {short_time(measured[count])} a step")
    notes.append(
        "each machine holds what no other one has: without it the run begins again from its checkpoint, in the best "
        "layout for the machines that are left, or waits"
    )
    ways: dict[str, Any] = {"restart, waiting": {"use": "restart", "interval": "daly"}}
    job: dict[str, Any] = {"tensor": asked.cluster.node}
    if len(measured) > 1:
        job |= {"measured": {str(count): seconds for count, seconds in measured.items()}, "least": min(measured)}
        ways["restart on the rest"] = {"use": "restart", "interval": "daly", "fewer": True}
        ways["restart on the rest, hourly"] = {"use": "restart", "interval": 3600.0, "fewer": True}
    return {"cluster": {}, "job": job, "ways": ways}


def best_of(asked: Prepared, workers: int) -> Prediction | None:
    """The quickest layout of fewer workers, of steps that they divide; None: nothing fits."""
    rounded = asked.work.with_batch(-(-asked.work.batch // workers) * workers)
    for work in (asked.work, rounded):
        found = search(work, asked.cluster, workers, float(work.step_tokens), Fixed()).best
        if found:
            return found[0].step
    return None
