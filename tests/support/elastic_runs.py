"""Small elastic runs: their settings, and how they are begun."""

from __future__ import annotations

import signal
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tiny_text import text_source

from resilin.cluster.elastic_job import ElasticJob, JobEnded
from resilin.cluster.faults import Fault, never_met
from resilin.cluster.local import worker_command
from resilin.config import parse_settings
from resilin.run.elastic_start import launch
from resilin.run.events import Cluster, Event, StepDone
from resilin.run.settings import RunSettings
from resilin.run.start import start_run

STEPS = 14


def text_at(folder: Path) -> Path:
    """A file to learn from."""
    path = folder / "text.txt"
    path.write_text("the quick brown fox jumps over the lazy dog. " * 400)
    return path


def settings_of(text: Path, **over: Any) -> RunSettings:
    tree = {
        "source": text_source(text),
        "model": {"hidden_size": 32, "layers": 2, "heads": 4, "kv_heads": 2, "mlp_size": 48, "dropout": 0.1},
        "optimizer": {"lr": 3e-3},
        "train": {"steps": STEPS, "batch_size": 8, "micro_batch_size": 1, "threads": 1, "device": "cpu"},
        "precision": {"compute": "fp32"},
        "parallel": {"workers": 3, "timeout": 60},
        "cluster": {"elastic": True},
        "evaluation": {"every": 5, "batches": 3},
        "checkpoint": {"every": 4, "keep_last": 50},
        "log": {"tensorboard": False, "live": False},
    }
    for section, values in over.items():
        tree[section] = {**tree.get(section, {}), **values}
    return parse_settings(RunSettings, tree, "test")


def go(
    settings: RunSettings, folder: Path, faults: Sequence[Fault] = (), *, all_happen: bool = True, **more: Any
) -> JobEnded:
    """Launch a run; every fault has to happen, unless `all_happen` is false."""
    ended = launch(settings, folder, worker_command(), faults=faults, **more)
    if all_happen:
        check_met(folder, faults)
    return ended


def check_met(folder: Path, faults: Sequence[Fault]) -> None:
    """A fault that never happens tests nothing."""
    missed = never_met(faults, folder / "workers")
    assert not missed, f"these faults never happened: {missed}"


def alone(text: Path, folder: Path, **over: Any) -> Path:
    """The folder of a run by one process, to which nothing happens."""
    settings = settings_of(text, **{"parallel": {"workers": 0}, "cluster": {"elastic": False}, **over})
    assert start_run(settings, folder)[1].reason == "completed"
    return folder


def go_with_a_newcomer(settings: RunSettings, folder: Path) -> JobEnded:
    """Launch a run in which one more worker reads what it needs while step 3 is computed, however long that takes."""
    members = range(settings.parallel.workers)

    def watch(job: ElasticJob, event: Event) -> None:
        if isinstance(event, StepDone) and event.step == 1:
            job.add()
        if isinstance(event, Cluster) and event.what == "ready":
            job.signal(1, signal.SIGCONT)
        if isinstance(event, Cluster) and event.what == "preparing":
            threading.Thread(target=wake, args=(job,), daemon=True).start()  # one of them may not have stopped yet

    def wake(job: ElasticJob) -> None:
        while not over.wait(0.05):
            for number in members:
                job.signal(number, signal.SIGCONT)

    over = threading.Event()
    stops = [Fault(1, 2, "adding gradients up", "stop")]  # until there is a newcomer
    stops += [Fault(number, 3, "forward", "stop") for number in members]  # until it is told to read
    try:
        return go(settings, folder, stops, watch=watch)
    finally:
        over.set()
