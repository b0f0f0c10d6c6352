"""A run to which things happen on purpose, beside the same run to which nothing does: what was lost, and for how long.

What happens is drawn from a seed and written down as a list; the same list can be made to happen again. A blow falls so
many seconds after a step was taken, wherever the workers are by then.
"""

from __future__ import annotations

import json
import random
import signal
import statistics
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

from resilin.cluster.elastic_job import ElasticJob
from resilin.run.elastic_start import launch
from resilin.run.events import Cluster, Evaluated, Event, StepDone
from resilin.run.settings import RunSettings

Kind = Literal["kill", "stop", "drain", "add"]
_KINDS: tuple[Kind, ...] = ("kill", "stop", "drain", "add")


@dataclass(frozen=True, slots=True)
class Blow:
    """One thing that happens.

    Attributes:
        step: it falls after so many steps were taken,
        after: and so many seconds more.
        what: kill: SIGKILL; stop: SIGSTOP for `seconds`; drain: the worker leaves; add: another one comes.
        whom: which of the workers that train then, as a fraction of their number.
        seconds: of a stop.
    """

    step: int
    after: float
    what: Kind
    whom: float
    seconds: float = 0.0


def drawn(
    seed: int, steps: int, count: int, kinds: Sequence[Kind] = ("kill",), step_seconds: float = 0.2
) -> list[Blow]:
    """A list of blows, spread over a run.

    Args:
        seed: of all that is drawn.
        steps: of the run.
        count: how many blows.
        kinds: what may happen; all equally often.
        step_seconds: about how long a step takes: a blow falls anywhere in it.
    """
    draw, found = random.Random(seed), []
    for number in range(count):
        step = 1 + (number * max(steps - 2, 1)) // max(count, 1) + draw.randrange(max(1, (steps - 2) // max(count, 1)))
        what = draw.choice(list(kinds))
        seconds = draw.uniform(0.1, 1.0) if what == "stop" else 0.0
        found.append(Blow(min(step, steps - 1), draw.uniform(0, step_seconds), what, draw.random(), seconds))
    return sorted(found, key=lambda blow: (blow.step, blow.after))


@dataclass
class Told:
    """What one run told.

    Attributes:
        losses: (step, loss, gradient norm) of every step.
        evaluations: (step, name, loss).
        times: when each step was told of, seconds since the epoch.
        digest: of the weights in the end.
        changes: the facts of every change of the view.
        blows: what fell when: (seconds since the epoch, what, member).
        ended: how it ended, in words; "" if well.
    """

    losses: list[tuple[int, float, float]] = field(default_factory=list)
    evaluations: list[tuple[int, str, float]] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    digest: str = ""
    changes: list[dict[str, Any]] = field(default_factory=list)
    blows: list[tuple[float, str, int]] = field(default_factory=list)
    ended: str = ""

    def hear(self, event: Event) -> None:
        """One event of the run."""
        if isinstance(event, StepDone):
            self.losses.append((event.step, event.loss, event.grad_norm))
            self.times.append(event.time)
        elif isinstance(event, Evaluated):
            self.evaluations.append((event.step, event.name, event.metrics["loss"]))
        elif isinstance(event, Cluster) and event.what == "change":
            self.changes.append({"time": event.time, **event.facts})
        elif isinstance(event, Cluster) and event.what == "digest":
            self.digest = event.facts["weights"]


class _Striker:
    """Lets blows fall, one at a time: the next one waits until the run has taken a step after the change before."""

    def __init__(self, blows: Sequence[Blow], told: Told) -> None:
        self._left, self._told = list(blows), told
        self._since = threading.Event()
        self._lock = threading.Lock()
        self._wait_for = 0  # a number of changes

    def __call__(self, job: ElasticJob, event: Event) -> None:
        self._told.hear(event)
        if not isinstance(event, StepDone):
            return
        with self._lock:
            if not self._left or self._left[0].step > event.step or len(self._told.changes) < self._wait_for:
                return
            blow = self._left.pop(0)
            self._wait_for = len(self._told.changes) + 1
        threading.Thread(target=self._fall, args=(job, blow), daemon=True).start()

    def _fall(self, job: ElasticJob, blow: Blow) -> None:
        time.sleep(blow.after)
        members = job.training()
        if not members:
            return
        number = members[int(blow.whom * len(members))]
        if blow.what == "add" or (blow.what in ("kill", "drain") and len(members) < 2):
            number = job.add() or 0
        elif blow.what == "kill":
            job.signal(number, signal.SIGKILL)
        elif blow.what == "drain":
            job.signal(number, signal.SIGTERM)
        self._told.blows.append((time.time(), blow.what, number))
        if blow.what == "stop":
            job.signal(number, signal.SIGSTOP)
            time.sleep(blow.seconds)
            job.signal(number, signal.SIGCONT)
            with self._lock:
                self._wait_for -= 1  # nothing changes, unless it was stopped for too long


@dataclass(frozen=True)
class Report:
    """What came of it.

    Attributes:
        blows: how many fell.
        changes: of the view, the first not counted.
        steps_lost: of the undisturbed run's steps those that were not taken.
        bits_changed: losses, norms and evaluations that differ, and 1 if the weights do.
        redone: steps that were taken anew, of all changes together.
        recovery: seconds from each kill to the next step that was taken.
        halting: seconds of each change until all had come out.
        adopting: and from there until all went on.
        slowdown: seconds per step, disturbed / undisturbed (medians).
        ended: how the disturbed run ended, in words; "" if well.
    """

    blows: int
    changes: int
    steps_lost: int
    bits_changed: int
    redone: int
    recovery: list[float]
    halting: list[float]
    adopting: list[float]
    slowdown: float
    ended: str

    @property
    def good(self) -> bool:
        """Whether nothing was lost, and nothing changed."""
        return not (self.steps_lost or self.bits_changed or self.ended)


def compare(quiet: Told, struck: Told) -> Report:
    """A disturbed run beside one that was not."""
    there = {step for step, _, _ in struck.losses}
    differ = len(set(quiet.losses) - set(struck.losses)) + len(set(quiet.evaluations) - set(struck.evaluations))
    recovery = []
    for at, what, _ in struck.blows:
        if what == "kill" and (later := [t for t in struck.times if t > at]):
            recovery.append(min(later) - at)
    changes = struck.changes[1:]
    return Report(
        blows=len(struck.blows),
        changes=len(changes),
        steps_lost=len({step for step, _, _ in quiet.losses} - there),
        bits_changed=differ + (quiet.digest != struck.digest),
        redone=sum(change["redone"] for change in changes),
        recovery=sorted(recovery),
        halting=sorted(change["halting"] for change in changes),
        adopting=sorted(change["adopting"] for change in changes),
        slowdown=_pace(struck) / _pace(quiet) if len(quiet.times) > 2 and len(struck.times) > 2 else float("nan"),
        ended=struck.ended,
    )


def _pace(told: Told) -> float:
    return statistics.median(b - a for a, b in pairwise(told.times))


def run_told(settings: RunSettings, folder: Path, command: Sequence[str], blows: Sequence[Blow] = ()) -> Told:
    """Run, let blows fall, and keep what is told."""
    told = Told()
    told.ended = launch(settings, folder, command, watch=_Striker(blows, told)).message
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
        "fell": [list(fell) for fell in struck.blows],
        "changes": struck.changes,
    }
    (folder / "chaos.json").write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    return report, quiet, struck


def blows_of(path: Path) -> list[Blow]:
    """The list that an earlier `chaos.json` holds.

    Raises:
        ValueError: it is none.
    """
    try:
        told = json.loads(path.read_text(encoding="utf-8"))["blows"]
        found = [Blow(**one) for one in told]
    except (OSError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: holds no list of blows ({type(error).__name__}: {error})") from None
    if bad := [blow.what for blow in found if blow.what not in _KINDS]:
        raise ValueError(f"{path}: {bad[0]!r} is none of {', '.join(_KINDS)}")
    return found
