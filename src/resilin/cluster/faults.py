"""Failures on purpose: a worker that ends, stops or fails when it begins a certain thing in a certain step.

For tests: the launcher passes a list on to all workers, each of which takes its own, and says so in its output, so that
a fault that never happens is found out.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from resilin.parallel.activity import now

FAULTS = "RESILIN_FAULTS"
_MET = "happens on purpose: "


@dataclass(frozen=True, slots=True)
class Fault:
    """What happens to a worker.

    Attributes:
        member: its number.
        step: in which it happens.
        at: how what it begins then is called, or a part of that: "updating weights".
        do: kill: SIGKILL; stop: SIGSTOP; leave: SIGTERM; fail: an error of its own program.
    """

    member: int
    step: int
    at: str
    do: Literal["kill", "stop", "leave", "fail"] = "kill"


class FaultError(Exception):
    """A failure on purpose."""


def to_environment(faults: Sequence[Fault]) -> dict[str, str]:
    """The variable that workers look at."""
    return {FAULTS: json.dumps([asdict(fault) for fault in faults])} if faults else {}


def await_faults(member: int) -> None:
    """Called in a worker: its faults happen to it from now on."""
    left = [Fault(**told) for told in json.loads(os.environ.get(FAULTS, "[]"))]
    left = [fault for fault in left if fault.member == member]
    if left:
        now.told = lambda begun: _meet(left, begun)


def never_met(faults: Sequence[Fault], logs: Path) -> list[Fault]:
    """Faults that have not happened, of a run that is over.

    Args:
        faults: of the run.
        logs: the folder with its workers' output.
    """
    met = {
        line.removeprefix(_MET)
        for path in logs.glob("worker-*.log")
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines()
        if line.startswith(_MET)
    }
    return [fault for fault in faults if _written(fault) not in met]


def _written(fault: Fault) -> str:
    return json.dumps(asdict(fault))


def _meet(left: list[Fault], begun: str) -> None:
    for fault in list(left):
        if fault.step == now.step and fault.at in begun:
            left.remove(fault)
            os.write(2, f"{_MET}{_written(fault)}\n".encode())  # at once: there may be no later
            if fault.do == "fail":
                raise FaultError(f"a failure on purpose while {begun} in step {now.step}")
            number = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP, "leave": signal.SIGTERM}[fault.do]
            os.kill(os.getpid(), number)
