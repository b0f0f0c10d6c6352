"""The death of a process is noticed when it begins to die."""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import signal
import threading
import time
from multiprocessing.connection import Connection

import pytest
import torch

from resilin.checkpoint.dying import killed_by
from resilin.cluster import pulse
from resilin.memory.pages import Pages

pytestmark = pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="Linux only")


def beats(pipe: Connection, megabytes: int, ends: bool) -> None:
    faulthandler.disable()  # it would tell of the fault that it is killed by
    kept = torch.zeros(megabytes << 18)
    handle = pulse.begin()
    assert handle is not None
    pipe.send(handle.json())
    if not ends:
        threading.Event().wait()
    pipe.recv()
    del kept
    os._exit(3)


def begun(megabytes: int = 1, ends: bool = False) -> tuple[multiprocessing.Process, list[int], Connection]:
    context = multiprocessing.get_context("fork")
    mine, theirs = context.Pipe()
    process = context.Process(target=beats, args=(theirs, megabytes, ends), daemon=True)
    process.start()
    return process, mine.recv(), mine  # type: ignore[return-value]


@pytest.mark.parametrize("which", [signal.SIGKILL, signal.SIGSEGV])
def test_a_process_that_is_killed_is_told_with_its_signal(which: signal.Signals):
    process, handle, pipe = begun(600)
    died = threading.Event()
    told: list[int] = []

    def then(number: int) -> None:
        told.append(number)
        died.set()

    assert pulse.watch(handle, then)
    assert not died.wait(0.05)
    assert process.pid is not None
    os.kill(process.pid, which)
    assert died.wait(60)
    process.join(60)
    assert told == [which]
    pipe.close()


def test_a_process_that_ends_by_itself_is_no_news():
    process, handle, pipe = begun(ends=True)
    told: list[int] = []
    assert pulse.watch(handle, told.append)
    pipe.send(None)
    process.join(60)
    for thread in threading.enumerate():
        if thread.name == "resilin-watching":
            thread.join(60)
    assert process.exitcode == 3
    assert not told


def test_what_is_no_pulse_is_not_watched():
    threads = threading.active_count()
    for told in ([], [1, 2, 3], [os.getpid(), 0, 1, 1, 4096]):
        assert not pulse.watch(told, lambda which: None)
    assert threading.active_count() == threads


def test_where_there_are_no_such_mutexes_there_is_no_pulse(monkeypatch: pytest.MonkeyPatch):
    def refuses(pages: Pages) -> None:
        raise OSError(95, "pthread_mutexattr_setrobust")

    monkeypatch.setattr(pulse, "_make", refuses)
    assert pulse.begin() is None


def test_a_signal_is_read_of_a_process_that_is_dying():
    process, _, pipe = begun()
    assert process.pid is not None
    assert killed_by(process.pid) == 0
    os.kill(process.pid, signal.SIGKILL)
    until = time.monotonic() + 60
    while killed_by(process.pid) != signal.SIGKILL:
        assert time.monotonic() < until
        time.sleep(0.005)
    process.join(60)
    assert killed_by(process.pid) == 0  # nobody has this number any more
    pipe.close()
