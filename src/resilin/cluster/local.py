"""Starting workers on this machine, and seeing them through: the first that fails ends all, and its reason is told."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from resilin.cluster.endings import End, Ended, Failed, how_it_ended
from resilin.cluster.failure import REPORT
from resilin.cluster.lifeline import when_gone
from resilin.cluster.position import LISTENING
from resilin.cluster.process import Process, start_process

LAUNCHER = "RESILIN_LAUNCHER"
"""The variable with the file descriptor of a pipe whose other end the launcher has: it ends with the launcher."""
_GRACE = 5.0  # seconds that workers have to end by themselves, once one has failed
_ORPHANED = 30.0  # seconds that they have to save and end, once the launcher has gone
_POLL = 0.05


def end_with_launcher() -> None:
    """Called in a worker: once the launcher is gone, killed perhaps, the worker finishes its step, saves and ends."""

    def end() -> None:
        os.write(2, b"the launcher is gone: finishing this step, then saving\n")
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(_ORPHANED)
        os._exit(1)

    when_gone(LAUNCHER, end, "resilin-launcher")


def run_workers(command: Sequence[str], places: Sequence[str], logs: Path) -> Ended:
    """Run a command as each of several workers, and wait for all.

    The first worker writes to this terminal, every other one into `logs/worker-N.log`. Ctrl-C, SIGTERM and SIGUSR1 are
    passed on to all; at Ctrl-C after that all are killed (`resilin.run.interrupts` has why only then).

    Args:
        command: what every worker runs.
        places: of every worker, in words.
        logs: a folder, made if needed.
    """
    logs.mkdir(parents=True, exist_ok=True)
    job = _Job(places, logs)
    with _passing_on(job):
        job.start(command)
        return job.wait()


class _Job:
    def __init__(self, places: Sequence[str], logs: Path) -> None:
        self.places, self.workers, self.logs = places, len(places), logs
        self.reports = [logs / f"worker-{rank}.failure.json" for rank in range(self.workers)]
        self.processes: list[Process] = []
        self.interrupts = 0
        self.stopped: set[int] = set()  # whom we killed
        self.alive = [time.time()] * self.workers

    def start(self, command: Sequence[str]) -> None:
        """Start all. The launcher listens before the first worker does, so that no other job can take the port."""
        self._theirs, self._ours = os.pipe()
        with socket.socket() as listening:
            listening.bind(("127.0.0.1", 0))
            listening.listen(self.workers)
            for rank, report in enumerate(self.reports):
                report.unlink(missing_ok=True)
                environment = {
                    **os.environ,
                    "RANK": str(rank),
                    "WORLD_SIZE": str(self.workers),
                    "LOCAL_RANK": str(rank),
                    "LOCAL_WORLD_SIZE": str(self.workers),
                    "MASTER_ADDR": "127.0.0.1",
                    "MASTER_PORT": str(listening.getsockname()[1]),
                    REPORT: str(report),
                }
                kept = {LAUNCHER: self._theirs}
                if rank == 0:
                    kept[LISTENING] = listening.fileno()
                    self.processes.append(start_process(command, environment, kept=kept))
                else:
                    with self.log(rank).open("wb") as log:
                        self.processes.append(start_process(command, environment, output=log, kept=kept))
        os.close(self._theirs)

    def log(self, rank: int) -> Path:
        """Where a worker's output goes."""
        return self.logs / f"worker-{rank}.log"

    def pass_on(self, number: int) -> None:
        """Send a signal to all workers that still run; at Ctrl-C after another, kill them."""
        if self.interrupts and number != signal.SIGINT:
            return
        self.interrupts += 1
        for process in self.processes:
            if process.poll() is None:
                process.send_signal(number if self.interrupts == 1 else signal.SIGKILL)

    def wait(self) -> Ended:
        """Wait for all; whoever is left behind by a failure is ended."""
        failed_at: float | None = None
        while True:
            began = time.time()
            running = [rank for rank, process in enumerate(self.processes) if process.poll() is None]
            for rank in running:
                self.alive[rank] = began
            if not running:
                break
            if failed_at is None:
                failed = any(process.poll() not in (None, 0) for process in self.processes)
                failed_at = time.monotonic() if failed else None
            elif time.monotonic() - failed_at > _GRACE:
                for rank in running:
                    self.stopped.add(rank)
                    self.processes[rank].kill()
            time.sleep(_POLL)
        os.close(self._ours)
        return how_it_ended([self._end(rank) for rank in range(self.workers)], self.interrupts)

    def _end(self, rank: int) -> End:
        report, told = self.reports[rank], None
        if report.exists():
            told = Failed(**json.loads(report.read_text(encoding="utf-8")))
        log = "above" if rank == 0 else str(self.log(rank))
        code = self.processes[rank].wait()
        return End(rank, self.places[rank], code, self.alive[rank], rank in self.stopped, told, log)


class _passing_on:  # noqa: N801
    """While entered, SIGINT, SIGTERM and SIGUSR1 go to a job's workers."""

    def __init__(self, job: _Job) -> None:
        self._job = job

    def __enter__(self) -> None:
        passed_on = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
        self._before = {number: signal.signal(number, self._handle) for number in passed_on}

    def _handle(self, number: int, frame: object) -> None:
        self._job.pass_on(number)

    def __exit__(self, *_: object) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)


def this_command() -> list[str]:
    """What started this process, to be run again as a worker."""
    return [sys.executable, "-m", "resilin", *sys.argv[1:]]


def worker_command() -> list[str]:
    """What runs as a worker of an elastic run, which gets everything else from its launcher."""
    return [sys.executable, "-m", "resilin", "train", "-"]
