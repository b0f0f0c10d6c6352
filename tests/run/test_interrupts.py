"""Who is heard how often when a run is to end: people, schedulers and launchers."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from resilin.cluster.failure import REPORT
from resilin.cluster.position import MEMBER
from resilin.run.interrupts import EXIT_INTERRUPTED

SCRIPT = """
import os, signal, sys
from resilin.run.interrupts import Interrupts
left = []
with Interrupts((lambda: left.append(1)) if "leaves" in sys.argv[1] else None) as interrupts:
    for name in sys.argv[2:]:
        os.kill(os.getpid(), signal.Signals[name])
    print(interrupts.requested, len(left))
"""


def told(kind: str, *signals: str, **more: str) -> tuple[int, str]:
    environment = {name: value for name, value in os.environ.items() if name not in (MEMBER, REPORT)}
    ended = subprocess.run(
        [sys.executable, "-c", SCRIPT, kind, *signals], env={**environment, **more}, capture_output=True, text=True
    )
    return ended.returncode, ended.stdout.strip()


@pytest.mark.parametrize("first", ["SIGINT", "SIGTERM", "SIGUSR1"])
def test_what_a_scheduler_sends_again_is_the_same_wish_and_ctrl_c_again_is_not(first: str):
    assert told("ends", first) == (0, f"{first} 0")
    assert told("ends", first, "SIGTERM", "SIGUSR1", "SIGTERM") == (0, f"{first} 0")
    assert told("ends", first, "SIGTERM", "SIGINT") == (EXIT_INTERRUPTED, "")


@pytest.mark.parametrize("variable", [MEMBER, REPORT])
def test_in_a_worker_its_launcher_decides_when_patience_is_over(variable: str):
    assert told("ends", "SIGINT", "SIGINT", "SIGINT", **{variable: "1"}) == (0, "SIGINT 0")


def test_a_worker_that_may_leave_does_so_at_a_notice():
    assert told("leaves", "SIGTERM", "SIGUSR1") == (0, "None 2")
    assert told("leaves", "SIGTERM", "SIGINT") == (0, "SIGINT 1")


def test_handlers_are_as_before_afterwards():
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    before = [signal.getsignal(number) for number in numbers]
    from resilin.run.interrupts import Interrupts

    with Interrupts():
        assert all(signal.getsignal(number) not in before for number in numbers)
    assert [signal.getsignal(number) for number in numbers] == before
