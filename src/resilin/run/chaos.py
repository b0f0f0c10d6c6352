"""A run to which things happen on purpose, beside the same run to which nothing does.

What happens is drawn from a seed and written down as a list (`resilin.run.blows`). A blow falls so many seconds after a
step was taken, wherever the workers are by then.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict
from pathlib import Path

from resilin.cluster.elastic_job import ElasticJob
from resilin.run.blows import Blow, Fell, strike
from resilin.run.chaos_report import Report, Told, compare
from resilin.run.elastic_start import launch
from resilin.run.events import Event, StepDone
from resilin.run.settings import RunSettings

_SETTLE = 0.5  # seconds after which what somebody noticed at the end of a blow has become a change


class _Striker:
    """Lets blows fall, one at a time: the next one waits until the run has taken a step after the change before."""

    def __init__(self, blows: Sequence[Blow], told: Told) -> None:
        self._left, self._told = list(blows), told
        self._lock = threading.Lock()
        self._falling: threading.Thread | None = None
        self._wait_for = 0  # a number of changes
        self._over = threading.Event()

    def __call__(self, job: ElasticJob, event: Event) -> None:
        self._told.hear(event)
        if not isinstance(event, StepDone):
            return
        with self._lock:
            due = self._left and self._left[0].step <= event.step
            if not due or self._falling is not None or len(self._told.changes) < self._wait_for:
                return
            blow = self._left.pop(0)
            self._falling = threading.Thread(target=self._fall, args=(job, blow), daemon=True)
        self._falling.start()

    def close(self) -> None:
        """The run has ended: nothing more falls."""
        self._over.set()
        if (falling := self._falling) is not None:
            falling.join()

    def _fall(self, job: ElasticJob, blow: Blow) -> None:
        self._over.wait(blow.after)
        changes, members = len(self._told.changes), job.training()
        if members and not self._over.is_set():
            began = time.time()
            what, hit = strike(job, blow, members, self._over.wait)
            self._told.blows.append(Fell(began, what, hit, time.time()))
            if what in ("kill", "drain", "add"):
                self._wait_for = changes + 1
            else:
                self._over.wait(_SETTLE)  # mostly nothing changes, unless it has lasted too long
        with self._lock:
            self._falling = None


def run_told(settings: RunSettings, folder: Path, command: Sequence[str], blows: Sequence[Blow] = ()) -> Told:
    """Run, let blows fall, and keep what is told."""
    told = Told()
    with closing(_Striker(blows, told)) as striker:
        told.ended = launch(settings, folder, command, watch=striker).message
    return told


def run_chaos(
    settings: RunSettings, folder: Path, command: Sequence[str], blows: Sequence[Blow]
) -> tuple[Report, Told, Told]:
    """Two runs of the same settings, one of them under blows.

    Args:
        settings: of both; elastic, and lost workers are replaced.
        folder: gets `quiet` and `struck`, and `chaos.json` with what happened.
        command: what every worker runs.
        blows: what is to happen.

    Returns:
        What came of it, and what each run told: the quiet one, then the other.
    """
    cluster = settings.cluster.model_copy(update={"elastic": True, "replace": True})
    settings = settings.model_copy(update={"cluster": cluster})
    quiet = run_told(settings, folder / "quiet", command)
    struck = run_told(settings, folder / "struck", command, blows)
    report = compare(quiet, struck)
    told = {
        "report": asdict(report),
        "blows": [asdict(blow) for blow in blows],
        "fell": [asdict(fell) for fell in struck.blows],
        "changes": struck.changes,
    }
    (folder / "chaos.json").write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    return report, quiet, struck
