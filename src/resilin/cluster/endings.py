"""From how each worker ended to how the job did: which failure came first, and which only followed. Pure."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from dataclasses import dataclass

from resilin.cluster.failure import Kind

INTERRUPTED = 130


@dataclass(frozen=True, slots=True)
class Failed:
    """What a worker that failed left behind.

    Attributes:
        time: when, in seconds since the epoch.
        kind: a reason, or what followed from another worker's failure.
        told: for people: the traceback, or a message.
        code: that it ends with.
    """

    time: float
    kind: Kind
    told: str
    code: int


@dataclass(frozen=True, slots=True)
class End:
    """How a worker ended.

    Attributes:
        rank: its number.
        place: in words.
        code: its exit code; of a signal, negative.
        alive: when it was last seen running, in seconds since the epoch.
        stopped: whether the launcher killed it.
        failed: what it left behind, if anything.
        log: where its output is, for people.
    """

    rank: int
    place: str
    code: int
    alive: float
    stopped: bool
    failed: Failed | None
    log: str

    @property
    def name(self) -> str:
        """For people: "worker 3 (pipeline stage 1, data 1)"."""
        return f"worker {self.rank}" + (f" ({self.place})" if self.place else "")


@dataclass(frozen=True, slots=True)
class Ended:
    """How a job of local workers ended.

    Attributes:
        code: the exit code to end with: that of the worker which failed first, as if it had been the only process.
        message: what went wrong, the first failure's traceback included; empty for nothing, or what was said already.
    """

    code: int
    message: str = ""


def how_it_ended(ends: Sequence[End], interrupts: int = 0) -> Ended:
    """Of all workers' ends, the one to tell.

    A reason in a worker goes before a worker killed by the system, if it was there before that one was killed; then
    come those that waited in vain, whose text has all workers in it; connections that broke explain nothing.

    Args:
        ends: of all workers.
        interrupts: how often the user asked the job to end.
    """
    if not any(end.code for end in ends):
        return Ended(0)
    if interrupts > 1:
        return Ended(INTERRUPTED, "ended at once; the last saved checkpoint is unaffected")
    killed = min((end for end in ends if end.code < 0 and not end.stopped), key=lambda end: end.alive, default=None)
    told = sorted((end.failed.time, end.rank) for end in ends if end.failed is not None and end.failed.kind == "reason")
    if told and (killed is None or told[0][0] < killed.alive):
        return _told(ends, told[0][1])
    if interrupts:
        return Ended(INTERRUPTED)
    if killed is not None:
        return Ended(1, _killed(killed))
    said = {end.code for end in ends if end.code and end.failed is None and not end.stopped}
    if said and not any(end.failed for end in ends):
        return Ended(max(said))  # interrupted, or a loss that is not finite: the first worker has told
    followed = sorted(
        (end.failed.kind != "timeout", end.failed.time, end.rank) for end in ends if end.failed is not None
    )
    if followed:
        return _told(ends, followed[0][2])
    end = next(end for end in ends if end.code)
    return Ended(1, f"{end.name} ended with exit code {end.code}; its output: {end.log}")


def _told(ends: Sequence[End], rank: int) -> Ended:
    end = ends[rank]
    assert end.failed is not None
    stopped = sum(1 for other in ends if other.stopped)
    more = f"\n({stopped} of {len(ends)} workers had to be stopped)" if stopped else ""
    texts = [other.failed.told for other in ends if other.failed is not None and other.failed.kind == "reason"]
    if len(texts) == len(ends) and len(set(texts)) == 1:
        return Ended(end.failed.code, end.failed.told.rstrip())  # all alike: it is no worker's own
    head = f"{end.name} failed:\n" if end.failed.kind == "reason" else ""  # others name themselves in what they tell
    return Ended(end.failed.code, f"{head}{end.failed.told.rstrip()}{more}")


def _killed(killed: End) -> str:
    name = signal.Signals(-killed.code).name
    more = ", as the system does when memory runs out" if name == "SIGKILL" else ""
    return f"{killed.name} was killed ({name}{more}); the others were stopped. Its output: {killed.log}"
