"""What happens to a run on purpose: drawn from a seed, written down as a list, and made to happen again."""

from __future__ import annotations

import json
import random
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from resilin.cluster.elastic_job import ElasticJob
from resilin.cluster.isolation import SIDES, Side

Kind = Literal["kill", "stop", "slow", "partition", "drain", "add"]
KINDS: tuple[Kind, ...] = get_args(Kind)
_PERIOD = 0.05  # seconds of a slow worker's stopping and going on


@dataclass(frozen=True, slots=True)
class Blow:
    """One thing that happens.

    Attributes:
        step: it falls after so many steps were taken,
        after: and so many seconds more.
        what: kill: SIGKILL; stop: SIGSTOP for `seconds`; slow: stopped for a share of every 50 ms, for `seconds`;
            partition: cut off from others for `seconds`; drain: the worker leaves; add: another one comes.
        whom: which of the workers that train then, as a fraction of their number.
        seconds: that it lasts.
        share: of the time in which a slow worker is stopped.
        side: whom a worker is cut off from: "members", "coordinator" or "all".
        ends: whether its connections are ended then, so that all notice; else nothing gets through any more.
        many: how many workers are cut off, fewer than half of those that train.
    """

    step: int
    after: float
    what: Kind
    whom: float
    seconds: float = 0.0
    share: float = 0.0
    side: Side | Literal[""] = ""
    ends: bool = False
    many: int = 1


def drawn(
    seed: int,
    steps: int,
    count: int,
    kinds: Sequence[Kind] = ("kill",),
    step_seconds: float = 0.2,
    silence: float = 10.0,
    many: int = 1,
) -> list[Blow]:
    """A list of blows, spread over a run.

    Args:
        seed: of all that is drawn.
        steps: of the run.
        count: how many blows.
        kinds: what may happen; all equally often.
        step_seconds: about how long a step takes: a blow falls anywhere in it.
        silence: seconds after which a worker counts as lost: half of the partitions are over well before, half last
            well longer.
        many: how many workers a partition may cut off at once: those that copies make up for.
    """
    draw, found = random.Random(seed), []
    for number in range(count):
        step = 1 + (number * max(steps - 2, 1)) // max(count, 1) + draw.randrange(max(1, (steps - 2) // max(count, 1)))
        what = draw.choice(list(kinds))
        after, whom, more = draw.uniform(0, step_seconds), draw.random(), _more(what, draw, silence, many)
        found.append(Blow(min(step, steps - 1), after, what, whom, **more))
    return sorted(found, key=lambda blow: (blow.step, blow.after))


def _more(what: Kind, draw: random.Random, silence: float, many: int) -> dict[str, Any]:
    if what == "stop":
        return {"seconds": draw.uniform(0.1, min(1.0, silence / 3))}
    if what == "slow":
        return {"seconds": draw.uniform(0.5, 2.0), "share": draw.uniform(0.5, 0.9)}
    if what == "partition":
        times = draw.uniform(0.1, 0.4) if draw.random() < 0.5 else draw.uniform(2.5, 3.5)
        side, ends = draw.choice(SIDES), draw.random() < 0.5
        return {"seconds": times * silence, "side": side, "ends": ends, "many": draw.randint(1, many)}
    return {}


@dataclass(frozen=True, slots=True)
class Fell:
    """A blow that fell.

    Attributes:
        time: when, in seconds since the epoch.
        what: see `Blow`.
        members: numbers of the workers that it hit, or of those that come.
        ended: when it was over.
    """

    time: float
    what: Kind
    members: tuple[int, ...]
    ended: float


def strike(
    job: ElasticJob, blow: Blow, members: Sequence[int], wait: Callable[[float], object] = time.sleep
) -> tuple[Kind, tuple[int, ...]]:
    """Let a blow fall; returns once it is over, with what fell on whom.

    Nobody is taken away whom the model cannot do without; where teams compute together, whole ones come.

    Args:
        job: of the run.
        blow: to fall.
        members: that train now.
        wait: so many seconds, unless the run is over.
    """
    first = int(blow.whom * len(members))
    number = members[first]
    if blow.what == "add" or (blow.what in ("kill", "drain", "partition") and len(members) - job.team < job.fewest):
        return "add", tuple(job.add() or 0 for _ in range(job.team))
    if blow.what == "kill":
        job.signal(number, signal.SIGKILL)
    elif blow.what == "drain":
        job.signal(number, signal.SIGTERM)
    elif blow.what == "stop":
        _stopped(job, number, blow.seconds, wait)
    elif blow.what == "slow":
        until = time.monotonic() + blow.seconds
        while time.monotonic() < until:
            _stopped(job, number, blow.share * _PERIOD, wait)
            wait((1 - blow.share) * _PERIOD)
    elif blow.what == "partition":
        count = max(1, min(blow.many, (len(members) - job.fewest) // (2 * job.team)))
        hit = tuple(members[(first + more) % len(members)] for more in range(count))
        for one in hit:
            job.isolate(one, blow.side or "all", blow.ends, blow.seconds)
        wait(blow.seconds)
        return blow.what, hit
    return blow.what, (number,)


def _stopped(job: ElasticJob, number: int, seconds: float, wait: Callable[[float], object]) -> None:
    job.signal(number, signal.SIGSTOP)
    wait(seconds)
    job.signal(number, signal.SIGCONT)


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
    for blow in found:
        if blow.what not in KINDS:
            raise ValueError(f"{path}: {blow.what!r} is none of {', '.join(KINDS)}")
        if blow.what == "partition" and blow.side not in SIDES:
            raise ValueError(f"{path}: a partition's side {blow.side!r} is none of {', '.join(SIDES)}")
    return found
