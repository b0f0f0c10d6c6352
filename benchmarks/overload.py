"""Workers of an elastic run that are given up for dead while the machine is overloaded: none must be.

An elastic run with the default limits (`cluster.silence`, `cluster.hang`) on a machine that has four times as many
other processes as cores, each of which does nothing but compute. They start once the run has taken its first step. A
worker counts as given up wrongly whatever the reason is, as nothing is done to any of them.

    resilin bench run overload            10 minutes
    resilin bench run overload --quick    20 seconds
"""

from __future__ import annotations

import argparse
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path

from resilin.bench.results import Report, Row, results_name
from resilin.cluster.elastic_job import ElasticJob
from resilin.cluster.local import worker_command
from resilin.config import parse_settings
from resilin.run.chaos_report import Told
from resilin.run.elastic_start import launch
from resilin.run.events import Event, StepDone
from resilin.run.settings import RunSettings

MODEL = {"vocab_size": 4096, "hidden_size": 384, "layers": 5, "heads": 6, "kv_heads": 3, "mlp_size": 1024}
TIMES = 4  # busy processes for each core
INTERRUPTED = 130


def settings_of(workers: int, text: Path) -> RunSettings:
    tree = {
        "source": {
            "paths": [str(text)],
            "sequence_length": 64,
            "tokenizer": {"kind": "bytes"},
            "held_out": {"by": "tail"},
        },
        "model": MODEL,
        "optimizer": {"lr": 1e-3, "schedule": {"use": "resilin.optim.schedule:Constant"}},
        "train": {"steps": 10**6, "batch_size": 8, "micro_batch_size": 1, "threads": 1, "device": "cpu"},
        "precision": {"compute": "fp32"},
        "parallel": {"workers": workers},
        "cluster": {"elastic": True},
        "checkpoint": {"every": 0},
        "log": {"tensorboard": False, "live": False},
    }
    return parse_settings(RunSettings, tree, "benchmark")


class Load:
    """Busy processes, from the first step on; so many seconds later the run is told to end."""

    def __init__(self, count: int, seconds: float) -> None:
        self._count, self._seconds = count, seconds
        self._busy: list[subprocess.Popen[bytes]] = []
        self._until: float | None = None
        self.told = Told()
        self.began = 0.0

    def __call__(self, job: ElasticJob, event: Event) -> None:
        self.told.hear(event)
        if not isinstance(event, StepDone):
            return
        now = time.monotonic()
        if self._until is None:
            self.began, self._until = event.time, now + self._seconds
            for _ in range(self._count):
                self._busy.append(subprocess.Popen([sys.executable, "-c", "while True: pass"]))
        elif now > self._until:
            self._until = float("inf")
            os.kill(os.getpid(), signal.SIGINT)  # it saves and ends

    def close(self) -> None:
        for process in self._busy:
            process.kill()
            process.wait()


def measured(workers: int, busy: int, seconds: float, folder: Path) -> Told:
    """What the run told."""
    text = folder / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 2000)
    load = Load(busy, seconds)
    try:
        ended = launch(settings_of(workers, text), folder / "run", worker_command(), watch=load)
    finally:
        load.close()
    if ended.code != INTERRUPTED:
        raise SystemExit(f"the run ended with {ended.code}: {ended.message}")
    load.told.times = [at for at in load.told.times if at >= load.began]
    return load.told


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--quick", action="store_true", help="20 seconds")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    seconds, cores = 20.0 if args.quick else args.seconds, len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as place:
        told = measured(args.workers, TIMES * cores, seconds, Path(place))
    for _, member, why in told.lost:
        print(f"worker {member} {why}")
    rows = rows_of(told, args.workers, TIMES * cores, cores, seconds)
    for row in rows:
        print(f"{row.name}: {row.ours:.3g} {row.unit}")
    settings = {"workers": args.workers, "busy": TIMES * cores, "seconds": seconds, "model": MODEL}
    print(f"wrote {Report.of(results_name('overload', 'cpu'), settings, rows).write(args.output)}")


def rows_of(told: Told, workers: int, busy: int, cores: int, seconds: float) -> list[Row]:
    """How many were given up, and how slow the run was."""
    title = f"{workers} workers beside {busy} busy processes on {cores} cores, {seconds:g} s"
    steps = [b - a for a, b in pairwise(told.times)]
    lost = Row(
        name=f"{title}: workers given up for dead, of which none was",
        unit="workers",
        ours=float(len(told.lost)),
        better="lower",
        note="; ".join(f"worker {member} {why}" for _, member, why in told.lost),
    )
    if not steps:
        return [lost]
    took = Row(
        name=f"{title}: a step", unit="s", ours=statistics.median(steps), better="lower", runs={"ours": steps[:1000]}
    )
    longest = Row(name=f"{title}: the longest step", unit="s", ours=max(steps), better="lower")
    return [lost, took, longest]


if __name__ == "__main__":
    main()
