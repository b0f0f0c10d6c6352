"""Curves in an experiment tracker that the user has installed: Weights & Biases or MLflow."""

from __future__ import annotations

import importlib
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from resilin.checkpoint.atomic import write_file
from resilin.config import UserError
from resilin.run.events import Event, Failure, RunEnded, RunStarted, to_json
from resilin.run.tensorboard_log import scalars

_FILE = "tracker.json"
_LONGEST = 4000  # characters in a tag that every MLflow store takes


class TrackerError(UserError):
    """A tracker that was asked for and cannot be used."""


def _module(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise TrackerError(
            f"log.tracker = {name!r}: the package {name} cannot be imported ({error}); install it with "
            f"pip install 'resilin[{name}]', or set log.tracker=none"
        ) from None


def flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """A settings tree as `dotted.key`, value."""
    for key, value in settings.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _remembered(event: RunStarted, tracker: str) -> str | None:
    """The tracker's id of the run that goes on in this folder; None for a run that starts."""
    path = Path(event.folder) / _FILE
    if event.start_step == 0 or not path.exists():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8")).get(tracker)
    except (ValueError, AttributeError):
        raise TrackerError(f"{path}: is damaged; remove it to go on as a new run in {tracker}") from None
    return str(found) if found else None


def _remember(event: RunStarted, tracker: str, identity: str) -> None:
    if event.folder:
        write_file(Path(event.folder) / _FILE, json.dumps({tracker: identity}) + "\n")


class WandbLog:
    """A listener that sends curves and settings to Weights & Biases (`WANDB_MODE=offline` keeps them on disk).

    Args:
        project: the project.
        name: the run's name. A resumed run goes on in the run whose id is kept in its folder.
    """

    def __init__(self, project: str, name: str) -> None:
        self._wandb = _module("wandb")
        self._project, self._name = project, name
        self._run: Any = None

    def __call__(self, event: Event) -> None:
        """Send the event's points."""
        if isinstance(event, RunStarted):
            self._start(event)
        elif self._run is None:
            return
        elif values := scalars(event):
            self._run.log({**values, "step": getattr(event, "step", 0)})
        elif isinstance(event, Failure):
            self._run.summary["failure"] = event.message
        elif isinstance(event, RunEnded):
            self._run.summary["reason"] = event.reason

    def _start(self, event: RunStarted) -> None:
        identity = _remembered(event, "wandb")
        self._run = self._wandb.init(
            project=self._project,
            name=self._name,
            id=identity,
            resume="allow" if identity else None,
            config=to_json(event)["settings"],
        )
        # Its own step may never go back, but a run resumed from an earlier checkpoint does.
        self._run.define_metric("*", step_metric="step")
        _remember(event, "wandb", self._run.id)

    def close(self) -> None:
        """Send what is left."""
        if self._run is not None:
            self._run.finish()
            self._run = None


class MlflowLog:
    """A listener that sends curves and settings to MLflow (`MLFLOW_TRACKING_URI` says where).

    Args:
        project: the experiment.
        name: the run's name. A resumed run goes on in the run whose id is kept in its folder.
    """

    def __init__(self, project: str, name: str) -> None:
        self._mlflow = _module("mlflow")
        self._project, self._name = project, name
        self._started = False
        self._reason = "failed"

    def __call__(self, event: Event) -> None:
        """Send the event's points."""
        if isinstance(event, RunStarted):
            self._start(event)
        elif not self._started:
            return
        elif values := scalars(event):
            finite = {key: value for key, value in values.items() if math.isfinite(value)}
            self._mlflow.log_metrics(finite, step=getattr(event, "step", 0))
        elif isinstance(event, Failure):
            self._mlflow.set_tag("failure", event.message[:_LONGEST])
        elif isinstance(event, RunEnded):
            self._reason = event.reason

    def _start(self, event: RunStarted) -> None:
        self._mlflow.set_experiment(self._project)
        run = self._mlflow.start_run(run_id=_remembered(event, "mlflow"), run_name=self._name)
        self._started = True
        _remember(event, "mlflow", run.info.run_id)
        self._mlflow.log_dict(to_json(event)["settings"], "settings.json")
        # Tags and not parameters, which may not change when a run goes on with other settings.
        self._mlflow.set_tags({key: str(value)[:_LONGEST] for key, value in flat(event.settings)})

    def close(self) -> None:
        """End the run there, as finished, killed or failed."""
        if self._started:
            status = {"completed": "FINISHED", "interrupted": "KILLED"}.get(self._reason, "FAILED")
            self._mlflow.end_run(status)
            self._started = False


def tracker_log(tracker: Literal["wandb", "mlflow"], *, project: str, name: str) -> WandbLog | MlflowLog:
    """The listener of a tracker.

    Raises:
        TrackerError: when its package is not installed.
    """
    return WandbLog(project, name) if tracker == "wandb" else MlflowLog(project, name)
