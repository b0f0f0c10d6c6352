"""Curves in an experiment tracker that the user has installed: Weights & Biases or MLflow."""

from __future__ import annotations

import importlib
import json
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, Protocol

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


class Tracker(Protocol):
    """What is asked of a tracker's own library."""

    def start(self, event: RunStarted, identity: str | None) -> str:
        """Begin a run, or go on in the one of this id; gives its id."""

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Add points to curves."""

    def note(self, key: str, text: str) -> None:
        """Write something beside the curves."""

    def end(self, reason: str) -> None:
        """Send what is left; the reason is that of `RunEnded`, or "failed" where none came."""


class Wandb:
    """Weights & Biases (`WANDB_MODE=offline` keeps everything on disk)."""

    def __init__(self, project: str, name: str) -> None:
        self._wandb = _module("wandb")
        self._project, self._name = project, name
        self._run: Any = None

    def start(self, event: RunStarted, identity: str | None) -> str:
        """Settings become the run's config."""
        self._run = self._wandb.init(
            project=self._project,
            name=self._name,
            id=identity,
            resume="allow" if identity else None,
            config=to_json(event)["settings"],
        )
        # Its own step may never go back, but a run resumed from an earlier checkpoint does.
        self._run.define_metric("*", step_metric="step")
        return str(self._run.id)

    def log(self, values: Mapping[str, float], step: int) -> None:
        """One row."""
        self._run.log({**values, "step": step})

    def note(self, key: str, text: str) -> None:
        """In the run's summary."""
        self._run.summary[key] = text

    def end(self, reason: str) -> None:
        """The exit code tells its page how the run ended."""
        self._run.summary["reason"] = reason
        self._run.finish(exit_code=1 if reason == "failed" else 0)


class Mlflow:
    """MLflow (`MLFLOW_TRACKING_URI` says where)."""

    def __init__(self, project: str, name: str) -> None:
        self._mlflow = _module("mlflow")
        self._project, self._name = project, name

    def start(self, event: RunStarted, identity: str | None) -> str:
        """Settings become tags, not parameters, which may not change when a run goes on with others."""
        self._mlflow.set_experiment(self._project)
        run = self._mlflow.start_run(run_id=identity, run_name=self._name)
        self._mlflow.log_dict(to_json(event)["settings"], "settings.json")
        self._mlflow.set_tags({key: str(value)[:_LONGEST] for key, value in flat(event.settings)})
        return str(run.info.run_id)

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Only what is finite: its data bases refuse the rest."""
        self._mlflow.log_metrics({key: value for key, value in values.items() if math.isfinite(value)}, step=step)

    def note(self, key: str, text: str) -> None:
        """As a tag."""
        self._mlflow.set_tag(key, text[:_LONGEST])

    def end(self, reason: str) -> None:
        """As finished, killed or failed."""
        self._mlflow.end_run({"completed": "FINISHED", "interrupted": "KILLED"}.get(reason, "FAILED"))


class TrackerLog:
    """A listener that sends curves, settings, failures and the end of a run to a tracker.

    A tracker that fails at the start is an error; one that fails later is a warning, and training goes on.

    Args:
        kind: its name, for messages and for remembering its id in the run folder.
        tracker: speaks to it.
    """

    def __init__(self, kind: str, tracker: Tracker) -> None:
        self._kind, self._tracker = kind, tracker
        self._started = self._complained = False
        self._reason = "failed"

    def __call__(self, event: Event) -> None:
        """Send what the event says."""
        if isinstance(event, RunStarted):
            self._start(event)
        elif not self._started:
            return
        elif values := scalars(event):
            self._try(lambda: self._tracker.log(values, getattr(event, "step", 0)))
        elif isinstance(event, Failure):
            self._try(lambda: self._tracker.note("failure", event.message))
        elif isinstance(event, RunEnded):
            self._reason = event.reason

    def _start(self, event: RunStarted) -> None:
        try:
            identity = self._tracker.start(event, _remembered(event, self._kind))
        except UserError:
            raise
        except Exception as error:  # whatever its library raises
            raise TrackerError(
                f"{self._kind} cannot be started: {error}; mend it, or set log.tracker=none to train without it"
            ) from error
        _remember(event, self._kind, identity)
        self._started = True

    def _try(self, send: Callable[[], None]) -> None:
        try:
            send()
        except Exception as error:  # a lost network should cost curves, not the run
            if not self._complained:
                self._complained = True
                warnings.warn(f"{self._kind} does not take what is sent, training goes on: {error}", stacklevel=2)

    def close(self) -> None:
        """Send what is left, and how the run ended."""
        if self._started:
            self._started = False
            self._try(lambda: self._tracker.end(self._reason))

    def __enter__(self) -> TrackerLog:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


def tracker_log(kind: Literal["wandb", "mlflow"], *, project: str, name: str) -> TrackerLog:
    """The listener of a tracker.

    Args:
        kind: which.
        project: its project or experiment.
        name: the run's name there. A resumed run goes on in the run whose id is kept in its folder.

    Raises:
        TrackerError: when its package is not installed.
    """
    return TrackerLog(kind, Wandb(project, name) if kind == "wandb" else Mlflow(project, name))
