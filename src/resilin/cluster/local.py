"""Starting workers on this machine, and seeing them through: the first that fails ends all, and its reason is told."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

REPORT = "RESILIN_FAILURE_REPORT"
"""The variable with the path where a worker that fails says why."""
WHERE = [""]
"""What this worker is among all, in words ("pipeline stage 1, data 0"), once that is known."""
_GRACE = 10.0  # seconds that workers have to end by themselves, once one has failed
_POLL = 0.05


@dataclass(frozen=True, slots=True)
class Ended:
    """How a job of local workers ended.

    Attributes:
        code: the exit code to end with.
        message: what went wrong, the first failure's traceback included; empty for nothing.
    """

    code: int
    message: str = ""


def report_failure(error: BaseException, told: str) -> None:
    """Called in a worker that fails: leaves its reason where the launcher looks for it.

    Args:
        error: that it failed with.
        told: what is to be shown: the traceback, or a message for the user.
    """
    path = os.environ.get(REPORT)
    if path:
        report = {"time": time.time(), "error": f"{type(error).__name__}: {error}", "told": told, "where": WHERE[0]}
        with Path(path).open("w", encoding="utf-8") as file:
            json.dump(report, file)


def free_port() -> int:
    """A port of the loopback interface that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def run_workers(command: Sequence[str], workers: int, logs: Path) -> Ended:
    """Run a command as each of so many workers, and wait for all.

    The first worker writes to this terminal, every other one into `logs/worker-N.log`. Ctrl-C and SIGTERM are passed on
    to all.

    Args:
        command: what every worker runs.
        workers: how many.
        logs: a folder, made if needed.
    """
    logs.mkdir(parents=True, exist_ok=True)
    job = _Job(command, workers, logs)
    with _passing_on(job):
        return job.wait()


class _Job:
    def __init__(self, command: Sequence[str], workers: int, logs: Path) -> None:
        self.logs = logs
        self.reports = [logs / f"worker-{rank}.failure.json" for rank in range(workers)]
        self.processes: list[subprocess.Popen[bytes]] = []
        self.interrupted = False
        port = free_port()
        for rank, report in enumerate(self.reports):
            report.unlink(missing_ok=True)
            environment = {
                **os.environ,
                "RANK": str(rank),
                "WORLD_SIZE": str(workers),
                "LOCAL_RANK": str(rank),
                "LOCAL_WORLD_SIZE": str(workers),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                REPORT: str(report),
            }
            if rank == 0:
                self.processes.append(subprocess.Popen(command, env=environment, start_new_session=True))
            else:
                with (logs / f"worker-{rank}.log").open("wb") as log:
                    self.processes.append(
                        subprocess.Popen(
                            command,
                            env=environment,
                            start_new_session=True,  # Ctrl-C reaches the launcher alone, which passes it on
                            stdin=subprocess.DEVNULL,
                            stdout=log,
                            stderr=subprocess.STDOUT,
                        )
                    )

    def pass_on(self, number: int) -> None:
        """Send a signal to all workers that still run."""
        self.interrupted = True
        for process in self.processes:
            if process.poll() is None:
                process.send_signal(number)

    def wait(self) -> Ended:
        """Wait for all; whoever is left behind by a failure is ended."""
        failed_at: float | None = None
        first: list[int] = []
        while any(process.poll() is None for process in self.processes):
            if failed_at is None:
                first = [rank for rank, process in enumerate(self.processes) if process.poll() not in (None, 0)]
                failed_at = time.monotonic() if first else None
            elif time.monotonic() - failed_at > _GRACE:
                for process in self.processes:
                    if process.poll() is None:
                        process.kill()
            time.sleep(_POLL)
        codes = [process.wait() for process in self.processes]
        if not any(codes):
            return Ended(0)
        agreed = set(codes)
        if len(agreed) == 1 and not any(report.exists() for report in self.reports):
            return Ended(codes[0])  # all ended alike and said why themselves: interrupted, or a loss that is not finite
        return Ended(1, self._why(codes, first))

    def _why(self, codes: Sequence[int], first: Sequence[int]) -> str:
        killed = [rank for rank in first if codes[rank] < 0]
        if killed:
            rank = killed[0]
            name = signal.Signals(-codes[rank]).name
            more = " (out of memory?)" if name == "SIGKILL" else ""
            return f"worker {rank} was ended by {name}{more}; the others were stopped. Its output: {self._log(rank)}"
        told = []
        for rank, report in enumerate(self.reports):
            if report.exists():
                told.append((json.loads(report.read_text(encoding="utf-8")), rank))
        if not told:
            rank = first[0] if first else next(rank for rank, code in enumerate(codes) if code)
            return f"worker {rank} ended with exit code {codes[rank]}; its output: {self._log(rank)}"
        reason, rank = min(told, key=lambda pair: pair[0]["time"])
        where = f" ({reason['where']})" if reason["where"] else ""
        others = f"\n{len(told) - 1} more failed because of it, or after it." if len(told) > 1 else ""
        return f"worker {rank}{where} failed first:\n{reason['told'].rstrip()}{others}"

    def _log(self, rank: int) -> str:
        return "above" if rank == 0 else str(self.logs / f"worker-{rank}.log")


class _passing_on:  # noqa: N801
    """While entered, SIGINT and SIGTERM go to a job's workers."""

    def __init__(self, job: _Job) -> None:
        self._job = job

    def __enter__(self) -> None:
        self._before = {number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM)}

    def _handle(self, number: int, frame: object) -> None:
        self._job.pass_on(number)

    def __exit__(self, *_: object) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)


def this_command() -> list[str]:
    """What started this process, to be run again as a worker."""
    return [sys.executable, "-m", "resilin", *sys.argv[1:]]
