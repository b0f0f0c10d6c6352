"""What a run under blows told, beside the same run in peace: what was lost, how long, and what was done about it."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from resilin.run.blows import KINDS, Fell, Kind
from resilin.run.events import Cluster, Evaluated, Event, StepDone


@dataclass
class Told:
    """What one run told.

    Attributes:
        losses: (step, loss, gradient norm) of every step.
        evaluations: (step, name, loss).
        times: when each step was told of, seconds since the epoch.
        digest: of the weights in the end.
        changes: the facts of every change of the view, with their `time`.
        lost: (seconds since the epoch, member, why) of everyone who was declared lost.
        blows: that fell.
        ended: how it ended, in words; "" if well.
    """

    losses: list[tuple[int, float, float]] = field(default_factory=list)
    evaluations: list[tuple[int, str, float]] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    digest: str = ""
    changes: list[dict[str, Any]] = field(default_factory=list)
    lost: list[tuple[float, int, str]] = field(default_factory=list)
    blows: list[Fell] = field(default_factory=list)
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
        elif isinstance(event, Cluster) and event.what == "lost":
            self.lost.append((event.time, event.facts["member"], event.facts["why"]))
        elif isinstance(event, Cluster) and event.what == "digest":
            self.digest = event.facts["weights"]


@dataclass(frozen=True)
class Recovery:
    """A blow, and what the run did about it.

    Attributes:
        what: it was.
        members: that it hit.
        step: taken last before it.
        seconds: from there to the next step that was taken.
        before: steps a second before the blow, since the one before it.
        after: after that next step, until the blow after it; both None where there were too few.
        changes: of the view until the next blow, each with `why`, `members`, `redone`, `kept`, `shards_moved`,
            `halting` and `adopting`.
    """

    what: Kind
    members: tuple[int, ...]
    step: int
    seconds: float | None
    before: float | None
    after: float | None
    changes: tuple[dict[str, Any], ...]


_OF_CHANGE = ("why", "members", "version", "redone", "kept", "shards_moved", "halting", "adopting")


@dataclass(frozen=True)
class Report:
    """What came of it.

    Attributes:
        blows: how many fell, by kind.
        changes: of the view, the first not counted.
        steps_lost: of the undisturbed run's steps those that were not taken.
        bits_changed: losses, norms and evaluations that differ, and 1 if the weights do.
        falsely_lost: members declared lost to whom nothing had happened, or that were only stopped or slow.
        redone: steps that were taken anew, of all changes together.
        recovery: by kind of blow, the seconds from each to the next step that was taken, ascending.
        halting: seconds of each change until all had come out.
        adopting: and from there until all went on.
        slowdown: seconds per step, disturbed / undisturbed (medians).
        throughput: steps a second before and after blows, medians; None where there were too few.
        recoveries: what was done about each blow.
        ended: how the disturbed run ended, in words; "" if well.
    """

    blows: dict[str, int]
    changes: int
    steps_lost: int
    bits_changed: int
    falsely_lost: list[tuple[int, str]]
    redone: int
    recovery: dict[str, list[float]]
    halting: list[float]
    adopting: list[float]
    slowdown: float
    throughput: tuple[float, float] | None
    recoveries: list[Recovery]
    ended: str

    @property
    def good(self) -> bool:
        """Whether nothing was lost, nothing changed, and nobody was given up who was only slow."""
        return not (self.steps_lost or self.bits_changed or self.falsely_lost or self.ended)


def compare(quiet: Told, struck: Told) -> Report:
    """A disturbed run beside one that was not."""
    there = {step for step, _, _ in struck.losses}
    differ = len(set(quiet.losses) - set(struck.losses)) + len(set(quiet.evaluations) - set(struck.evaluations))
    changes, recoveries = struck.changes[1:], _recoveries(struck)
    paces = [(one.before, one.after) for one in recoveries if one.before is not None and one.after is not None]
    return Report(
        blows={kind: count for kind in KINDS if (count := sum(fell.what == kind for fell in struck.blows))},
        changes=len(changes),
        steps_lost=len({step for step, _, _ in quiet.losses} - there),
        bits_changed=differ + (quiet.digest != struck.digest),
        falsely_lost=_falsely_lost(struck),
        redone=sum(change["redone"] for change in changes),
        recovery={
            kind: times
            for kind in KINDS
            if (times := sorted(o.seconds for o in recoveries if o.what == kind and o.seconds is not None))
        },
        halting=sorted(change["halting"] for change in changes),
        adopting=sorted(change["adopting"] for change in changes),
        slowdown=_pace(struck) / _pace(quiet) if len(quiet.times) > 2 and len(struck.times) > 2 else float("nan"),
        throughput=(statistics.median(b for b, _ in paces), statistics.median(a for _, a in paces)) if paces else None,
        recoveries=recoveries,
        ended=struck.ended,
    )


def _falsely_lost(told: Told) -> list[tuple[int, str]]:
    """Whoever was declared lost before it was killed or cut off, or without that."""
    fatal = [fell for fell in told.blows if fell.what in ("kill", "partition")]
    return [
        (member, why)
        for at, member, why in told.lost
        if not any(member in fell.members and fell.time <= at for fell in fatal)
    ]


def _recoveries(told: Told) -> list[Recovery]:
    found = []
    since = 0.0
    for fell, following in zip(told.blows, [*told.blows[1:], None], strict=False):
        end = float("inf") if following is None else following.time
        before = [at for at in told.times if since <= at <= fell.time]
        later = [at for at in told.times if fell.time < at <= end]
        since = later[0] if later else fell.time
        found.append(
            Recovery(
                fell.what,
                fell.members,
                sum(at <= fell.time for at in told.times),
                later[0] - fell.time if later else None,
                _rate(before),
                _rate([at for at in later if at >= fell.ended]),
                tuple(
                    {name: change[name] for name in _OF_CHANGE if name in change}
                    for change in told.changes[1:]
                    if fell.time < change["time"] <= end
                ),
            )
        )
    return found


def _rate(times: Sequence[float]) -> float | None:
    return (len(times) - 1) / (times[-1] - times[0]) if len(times) > 1 and times[-1] > times[0] else None


def _pace(told: Told) -> float:
    return statistics.median(b - a for a, b in pairwise(told.times))
