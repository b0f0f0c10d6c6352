"""Workers compute on while others wake up."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from forked import run_ranks
from ports import free_port

from resilin.cluster.join import joined
from resilin.cluster.position import Position
from resilin.cluster.scheduling import answer_at_once, compute_on

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="policies of processes are Linux's")


def in_a_child(work: Callable[[], list[int]]) -> list[int]:
    """Of this process, whose own policy stays as it is."""
    read, write = os.pipe()
    if not os.fork():
        os.write(write, repr(work()).encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as told:
        found: list[int] = [int(one) for one in told.read().strip("[]").split(",")]
    os.wait()
    return found


def test_threads_that_are_started_afterwards_have_it_too() -> None:
    def work() -> list[int]:
        found = [os.sched_getscheduler(0), int(compute_on())]
        thread = threading.Thread(target=lambda: found.append(os.sched_getscheduler(0)))
        thread.start()
        thread.join()
        return [*found, os.sched_getscheduler(0)]

    assert in_a_child(work) == [os.SCHED_OTHER, 1, os.SCHED_BATCH, os.SCHED_BATCH]


def test_a_thread_that_answers_leaves_it() -> None:
    def work() -> list[int]:
        found = []

        def answers() -> None:
            answer_at_once()
            found.append(os.sched_getscheduler(0))

        compute_on()
        thread = threading.Thread(target=answers)
        thread.start()
        thread.join()
        return [*found, os.sched_getscheduler(0)]

    assert in_a_child(work) == [os.SCHED_OTHER, os.SCHED_BATCH]


@pytest.mark.parametrize("policy", ["SCHED_IDLE", "SCHED_BATCH"])
def test_a_policy_that_somebody_chose_is_kept(policy: str) -> None:
    chosen = getattr(os, policy)

    def work() -> list[int]:
        os.sched_setscheduler(0, chosen, os.sched_param(0))
        found = int(compute_on())
        answer_at_once()
        return [found, os.sched_getscheduler(0)]

    assert in_a_child(work) == [int(policy == "SCHED_BATCH"), chosen]


def worker(rank: int, port: int) -> int:
    os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
    with joined(Position(rank, 2, rank, 2, "127.0.0.1", port), torch.device("cpu"), 60.0):
        return os.sched_getscheduler(0)


def test_workers_that_join_have_it() -> None:
    found: list[Any] = run_ranks(2, worker, free_port(), connect=False)
    assert found == [os.SCHED_BATCH] * 2
