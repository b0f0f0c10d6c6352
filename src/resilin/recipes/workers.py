"""Many small runs at once: worker processes with few threads each, and one progress bar over all of them.

A model of a few hundred thousand parameters cannot keep two cores busy, two such models can. Workers stand in a
process group of their own, so that Ctrl-C reaches only the runner, which then asks each to finish its step and save.
"""

from __future__ import annotations

import multiprocessing
import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing.queues import Queue
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from resilin.recipes.execute import Job, RunFailedError, train
from resilin.recipes.findings import RunRecord
from resilin.run.interrupts import Interrupts

_REPORT_EVERY = 0.5
"""Seconds between a worker's messages."""

Message = tuple[str, int, int]
"""A job's hash, its committed steps, and the process that trains it."""

_messages: Queue[Message] | None = None
_stopping = False


def _note_stop(number: int, frame: object) -> None:
    global _stopping
    _stopping = True


def _die_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(1)


def _prepare(messages: Queue[Message], threads: int, log: Path, parent: int) -> None:
    """Make a worker process ready."""
    global _messages
    import torch

    os.setsid()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _note_stop)  # between runs; a run has its own handling
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(out, sys.stderr.fileno())  # a line printed here would tear the progress bar
    torch.set_num_threads(threads)
    threading.Thread(target=_die_with, args=(parent,), daemon=True).start()
    _messages = messages


def _work(job: Job, threads: int) -> RunRecord | None:
    """Train one job in a worker."""
    global _stopping
    last = 0.0

    def report(step: int) -> None:
        nonlocal last
        now = time.monotonic()
        if _messages is not None and now - last > _REPORT_EVERY:
            last = now
            _messages.put((job.hash, step, os.getpid()))

    if _stopping:
        return None
    record = train(job, threads, report)
    # The run took the signal for itself; a job handed over in advance must not start after it.
    _stopping = record is None
    return record


class Board:
    """The one progress bar: steps of all runs, and which runs are being trained."""

    def __init__(self, jobs: Sequence[Job], console: Console):
        self.steps = {job.hash: job.settings.train.steps for job in jobs}
        self.labels = {job.hash: job.label for job in jobs}
        self.done_steps: dict[str, int] = {}
        self.finished = 0
        self.progress = Progress(
            TextColumn("{task.fields[runs]}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("steps"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(elapsed_when_finished=False),
            TextColumn("[dim]{task.fields[now]}"),
            console=console,
        )
        self.task = self.progress.add_task("", total=sum(self.steps.values()), runs="", now="")

    def update(self, job: str, step: int) -> None:
        """A job has committed this many steps."""
        self.done_steps[job] = step
        self._show()

    def finish(self, job: str) -> None:
        """A job is done (maybe early, or read back)."""
        self.done_steps[job] = self.steps[job]
        self.finished += 1
        self._show()
        if not self.progress.console.is_interactive:  # a log file shows no bar: one line for each run
            print_line = f"run {self.finished}/{len(self.steps)}: {self.labels[job]}"
            self.progress.console.print(print_line, highlight=False, markup=False)

    def _show(self) -> None:
        running = [self.labels[h] for h, s in self.done_steps.items() if s < self.steps[h]]
        self.progress.update(
            self.task,
            completed=sum(self.done_steps.values()),
            runs=f"runs {self.finished}/{len(self.steps)}",
            now=" | ".join(running[-4:]),
        )


@contextmanager
def _pool(processes: int, threads: int, log: Path) -> Iterator[tuple[ProcessPoolExecutor, Queue[Message]]]:
    context = multiprocessing.get_context("spawn")
    messages: Queue[Message] = context.Queue()
    log.parent.mkdir(parents=True, exist_ok=True)
    pool = ProcessPoolExecutor(processes, context, _prepare, (messages, threads, log, os.getpid()))
    try:
        yield pool, messages
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def train_all(
    jobs: Sequence[Job], processes: int, threads: int, log: Path, console: Console
) -> dict[str, RunRecord] | None:
    """The records of all jobs by hash.

    Args:
        jobs: with distinct hashes.
        processes: 1 trains in this process.
        threads: torch threads of each; 0: this machine's cores shared out evenly.
        log: file that receives what workers print.
        console: where progress is shown.

    Returns:
        None where the user interrupted: finished runs are kept, unfinished ones are saved.

    Raises:
        RunFailedError: for the first run that fails otherwise than by a non-finite number; the others are stopped.
    """
    threads = threads or max(1, len(os.sched_getaffinity(0)) // processes)
    board = Board(jobs, console)
    with board.progress:
        if processes == 1:
            return _in_this_process(jobs, threads, board)
        return _in_workers(jobs, processes, threads, log, board)


def _in_this_process(jobs: Sequence[Job], threads: int, board: Board) -> dict[str, RunRecord] | None:
    records = {}
    for job in jobs:
        record = train(job, threads, lambda step, job=job: board.update(job.hash, step))  # type: ignore[misc]
        if record is None:
            return None
        records[job.hash] = record
        board.finish(job.hash)
    return records


def _in_workers(
    jobs: Sequence[Job], processes: int, threads: int, log: Path, board: Board
) -> dict[str, RunRecord] | None:
    records: dict[str, RunRecord] = {}
    workers: set[int] = set()
    interrupted = False
    with Interrupts() as interrupts, _pool(processes, threads, log) as (pool, messages):
        pending: dict[Future[RunRecord | None], Job] = {pool.submit(_work, job, threads): job for job in jobs}
        while pending:
            if interrupts.requested is not None and not interrupted:
                interrupted = True
                _stop(pending, workers)
            _drain(messages, board, workers)
            for future in [f for f in pending if f.done()]:
                job = pending.pop(future)
                if future.cancelled():
                    continue
                record = _result(future, job, log, pending, workers)
                if record is not None:
                    records[job.hash] = record
                    board.finish(job.hash)
    return None if interrupted or len(records) < len(jobs) else records


def _drain(messages: Queue[Message], board: Board, workers: set[int]) -> None:
    try:
        while True:
            job, step, worker = messages.get(timeout=0.2)
            workers.add(worker)
            board.update(job, step)
    except queue.Empty:
        return


def _stop(pending: dict[Future[RunRecord | None], Job], workers: set[int]) -> None:
    """Start nothing more, and ask what runs to save."""
    for future in pending:
        future.cancel()
    for worker in workers:
        try:
            os.kill(worker, signal.SIGTERM)
        except ProcessLookupError:
            continue


def _result(
    future: Future[RunRecord | None],
    job: Job,
    log: Path,
    pending: dict[Future[RunRecord | None], Job],
    workers: set[int],
) -> RunRecord | None:
    try:
        return future.result()
    except BrokenProcessPool:
        raise RunFailedError(
            f"a worker process died while training {job.label}: out of memory, or killed from outside? What it "
            f"printed is in {log}; finished runs are kept, so the same command goes on from there"
        ) from None
    except Exception:
        _stop(pending, workers)
        raise
