"""One cell of a recipe as an ordinary run in its own folder, read back where it was trained before."""

from __future__ import annotations

import fnmatch
import importlib
import json
import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from resilin.config import SettingsError, parse_settings
from resilin.config.errors import UserError
from resilin.models.decoder import Decoder
from resilin.models.digest import weights_digest
from resilin.models.flops import parameter_counts
from resilin.recipes.cells import NOT_HASHED
from resilin.recipes.code_digest import code_digest
from resilin.recipes.findings import Evaluation, Metrics, RunRecord
from resilin.run.events import Event, Listener, RunStarted, StepDone
from resilin.run.folder import RunFolder, changed_settings
from resilin.run.run import Outcome, Run
from resilin.run.settings import RunSettings
from resilin.run.start import settle, start_run

Report = Callable[[int], None]
"""Told the number of committed steps, now and then."""

Runner = Callable[[RunSettings, Path, tuple[Listener, ...]], tuple[Run, Outcome]]
"""Trains in a folder, or goes on there, telling listeners of events; gives the run as it stands and how it ended."""


@dataclass(frozen=True, slots=True)
class Job:
    """A run to make: its settings, its hash and folder, the logged series its record keeps, and what trains it."""

    hash: str
    label: str
    settings: RunSettings
    folder: Path
    series: tuple[str, ...]
    runner: str = ""

    @property
    def record_file(self) -> Path:
        """Where the record of the finished run lies."""
        return self.folder / "record.json"


def _leaves(tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from _leaves(value, f"{path}.{key}" if path else key)
    else:
        yield path, tree


def trains_the_same(stored: dict[str, Any], settings: RunSettings) -> bool:
    """Whether a stored run is what these settings would train now.

    A setting that the stored run does not know is new and stands at a default that changes nothing; any other
    difference, a changed default among them, makes it another run.
    """
    now = dict(_leaves(json.loads(settings.model_dump_json())))
    then = {k: v for k, v in _leaves(stored) if k.split(".")[0] not in NOT_HASHED and k != "train.threads"}
    return all(key in now and now[key] == value for key, value in then.items())


def read_record(job: Job) -> RunRecord | None:
    """The record of an earlier run of this job; None where there is none, or it is not what would be made now."""
    try:
        tree = json.loads(job.record_file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except json.JSONDecodeError as error:
        raise SettingsError(f"{job.record_file}: not valid JSON ({error}); remove the folder to train again") from None
    if tuple(tree.pop("kept", ())) != job.series:
        return None
    record = parse_settings(RunRecord, tree, str(job.record_file))
    return record if trains_the_same(record.settings, job.settings) else None


def write_record(job: Job, record: RunRecord) -> None:
    """Write a record so that it is either whole or absent."""
    temporary = job.record_file.with_suffix(".tmp")
    tree = {"kept": job.series, **record.model_dump(mode="json")}
    temporary.write_text(json.dumps(tree, allow_nan=False), encoding="utf-8")
    temporary.replace(job.record_file)


def _number(value: Any) -> float | None:
    """A logged number; None for one that is not finite (the log writes those as strings)."""
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def _numbers(values: dict[str, Any]) -> Metrics:
    return {name: _number(value) for name, value in values.items()}


def _events(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            try:
                yield json.loads(line)
            except json.JSONDecodeError:
                continue  # a line cut short by a kill; its step was done again after the resume


def record_of(job: Job, run: Run, data_digest: str) -> RunRecord:
    """What the log of a finished run says.

    After a resume the steps since the last checkpoint are in the log twice: the later line counts.
    """
    evaluations: dict[int, Metrics] = {}
    series: dict[str, dict[int, float | None]] = {}
    stopped_at, seconds = None, 0.0
    for event in _events(RunFolder(job.folder).events_file):
        match event.get("event"):
            case "step":
                values = {**event["logs"], **{k: event[k] for k in ("loss", "lr", "grad_norm", "seconds")}}
                for name, value in values.items():
                    if any(fnmatch.fnmatchcase(name, wanted) for wanted in job.series):
                        series.setdefault(name, {})[event["step"]] = _number(value)
            case "eval":
                prefix = "" if event["name"] == "validation" else f"{event['name']}/"
                found = {f"{prefix}{name}": value for name, value in _numbers(event["metrics"]).items()}
                evaluations.setdefault(event["step"], {}).update(found)
            case "failure" if event["kind"] == "non_finite" and event["action"] == "stop":
                stopped_at = event["step"]
            case "end":
                seconds += event["seconds"]
    total = sum(p.numel() for p in run.model.parameters())
    model = run.model
    return RunRecord(
        hash=job.hash,
        status="finished" if stopped_at is None else "non-finite",
        stopped_at=stopped_at,
        evaluations=tuple(Evaluation(step=s, metrics=m) for s, m in sorted(evaluations.items())),
        series={name: tuple(sorted(points.items())) for name, points in sorted(series.items())},
        parameters=total,
        non_embedding=parameter_counts(model.settings).non_embedding if isinstance(model, Decoder) else total,
        wall_seconds=round(seconds, 2),
        data_digest=data_digest,
        code=code_digest(),
        weights=weights_digest(model),
        settings=job.settings.model_dump(mode="json"),
    )


def _continues(job: Job) -> bool:
    """Whether what an interrupted run left in the job's folder, if anything, is a part of what would be made now."""
    folder = RunFolder(job.folder)
    if not folder.holds_run():
        return True
    try:
        begun = folder.settings()
    except UserError:
        return False  # settings of another version
    settled = settle(job.settings, folder, resume=True)
    return not changed_settings(begun, settled)


class RunFailedError(UserError):
    """A run of a recipe ended for another reason than a non-finite number; the text is for the user."""


def runner_of(job: Job) -> Runner:
    """What trains a job: a run in this process, unless the recipe names something else."""
    if not job.runner:
        return lambda settings, folder, listeners: start_run(settings, folder, resume=True, extra_listeners=listeners)
    module, name = job.runner.split(":")
    found: Runner = getattr(importlib.import_module(module), name)
    return found


def train(job: Job, threads: int, report: Report | None = None) -> RunRecord | None:
    """Train, or go on with, or read back the run of a job.

    Args:
        job: what to train.
        threads: torch threads.
        report: told of progress.

    Returns:
        The record; None where the user interrupted (the run is saved and resumes the next time).

    Raises:
        RunFailedError: naming the run and what happened.
    """
    found = read_record(job)
    if found is not None:
        return found
    if job.record_file.exists() or not _continues(job):
        forget([job])  # made, or begun, by other settings or with other series
    quiet = job.settings.log.model_copy(update={"live": False})
    own = job.settings.train.model_copy(update={"threads": threads})
    settings = job.settings.model_copy(update={"log": quiet, "train": own})

    def listen(event: Event) -> None:
        if report is not None and isinstance(event, StepDone):
            report(event.step)
        elif report is not None and isinstance(event, RunStarted):
            report(event.start_step)

    run, outcome = runner_of(job)(settings, job.folder, (listen,))
    if outcome.reason == "interrupted":
        return None
    record = record_of(job, run, str(getattr(run.source, "digest", "")))
    if outcome.reason == "failed" and record.status == "finished":
        raise RunFailedError(f"{job.label} ({job.folder}): {outcome.message}")
    write_record(job, record)
    # A recipe has hundreds of runs and needs their records only.
    shutil.rmtree(RunFolder(job.folder).checkpoints, ignore_errors=True)
    return record


def forget(jobs: Sequence[Job]) -> None:
    """Remove the folders of jobs, so that they are trained again."""
    for job in jobs:
        shutil.rmtree(job.folder, ignore_errors=True)
