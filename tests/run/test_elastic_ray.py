"""Elastic runs on Ray: a cluster of several logical nodes on this machine, beside one process."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from elastic_checks import changes, check_same, events
from elastic_runs import check_met, settings_of
from ray_nodes import Nodes

from resilin.cluster.elastic_job import ElasticJob, JobEnded
from resilin.cluster.faults import Fault
from resilin.cluster.local import worker_command
from resilin.run.elastic_start import launch
from resilin.run.events import Cluster, Event, StepDone

ray = pytest.importorskip("ray", reason="Ray is not installed: pip install resilin[ray]")


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    made = Nodes()
    ray.init(address=made.address, log_to_driver=False, logging_level=logging.WARNING)
    yield made
    ray.shutdown()
    made.close()


def aside(what: Callable[[], object]) -> None:
    """Nodes take seconds to come and go, and the events of the job must not wait."""
    threading.Thread(target=what, daemon=True).start()


def members_of(event: Event) -> list[int]:
    return event.facts["members"] if isinstance(event, Cluster) and event.what == "change" else []


def test_a_worker_on_another_node_is_killed(nodes: Nodes, text: Path, undisturbed: Path, tmp_path: Path):
    where: list[str] = []

    def watch(job: ElasticJob, event: Event) -> None:
        if isinstance(event, StepDone) and event.step == 1:
            told = job.status()["members"]
            where.extend(one["host"] for one in told)

    settings = settings_of(text, parallel={"workers": 2}, cluster={"launcher": "ray", "placement": "STRICT_SPREAD"})
    faults = [Fault(1, 6, "adding gradients up")]
    ended = launch(settings, tmp_path / "run", worker_command(), faults=faults, watch=watch)
    assert ended == JobEnded(0, "")
    check_met(tmp_path / "run", faults)
    check_same(tmp_path / "run", undisturbed)
    assert len(set(where)) == 2
    assert [change["members"] for change in changes(tmp_path / "run")] == [[0, 1], [0]]


@pytest.mark.slow
def test_nodes_come_and_go_and_so_do_workers(nodes: Nodes, text: Path, undisturbed: Path, tmp_path: Path):
    """`most` is one more than there are nodes: it waits for one. When a node is lost its place moves to the next.

    One worker stands still until what is to happen has, so that the run has not ended before.
    """
    still: list[int] = []
    next_ones: list[Callable[[], object]] = [
        nodes.add,
        nodes.remove,
        nodes.add,
    ]

    def watch(job: ElasticJob, event: Event) -> None:
        if isinstance(event, StepDone) and event.step >= 2 and next_ones and not still:
            still.append(job.training()[-1])  # the newest is not on the node that goes
            job.signal(still[0], signal.SIGSTOP)
            aside(next_ones.pop(0))
        if isinstance(event, Cluster) and event.what in ("ready", "lost") and still:
            job.signal(still[0], signal.SIGCONT)
        if members_of(event):
            still.clear()

    settings = settings_of(
        text, parallel={"workers": 2}, cluster={"launcher": "ray", "most": 3, "silence": 120, "placement": "SPREAD"}
    )
    ended = launch(settings, tmp_path / "run", worker_command(), watch=watch)
    assert ended == JobEnded(0, "")
    check_same(tmp_path / "run", undisturbed)
    assert [len(change["members"]) for change in changes(tmp_path / "run")] == [2, 3, 2, 3]
    assert len([told for told in events(tmp_path / "run", "cluster") if told["what"] == "lost"]) == 1
