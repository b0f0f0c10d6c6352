"""An elastic run that wishes for more workers than there are nodes: Ray's own autoscaler starts one."""

from __future__ import annotations

import logging
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from elastic_checks import changes, check_same
from elastic_runs import alone, settings_of, text_at
from ray_nodes import PORT, Nodes

from resilin.cluster.addresses import listen
from resilin.cluster.elastic_job import ElasticJob, JobEnded
from resilin.cluster.local import worker_command
from resilin.config import UserError
from resilin.run.elastic_start import launch
from resilin.run.events import Cluster, Event, StepDone

ray = pytest.importorskip("ray", reason="Ray is not installed: pip install resilin[ray]")


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[Nodes]:
    try:
        listen("0.0.0.0", PORT).close()
    except UserError as error:
        pytest.skip(str(error))
    made = Nodes(True, tmp_path)
    ray.init(address=made.address, log_to_driver=False, logging_level=logging.WARNING)
    yield made
    ray.shutdown()
    made.close()


@pytest.mark.slow
def test_a_node_is_started_for_a_worker_that_waits(nodes: Nodes, tmp_path: Path):
    text = text_at(tmp_path)
    alone(text, tmp_path / "one")
    still: list[int] = []

    def watch(job: ElasticJob, event: Event) -> None:
        if isinstance(event, StepDone) and event.step >= 2 and not still:  # until the other has come
            still.append(0)
            job.signal(0, signal.SIGSTOP)
        if isinstance(event, Cluster) and event.what == "ready":
            job.signal(0, signal.SIGCONT)

    settings = settings_of(text, parallel={"workers": 1}, cluster={"launcher": "ray", "most": 2, "silence": 120})
    assert launch(settings, tmp_path / "run", worker_command(), watch=watch) == JobEnded(0, "")
    check_same(tmp_path / "run", tmp_path / "one")
    assert [change["members"] for change in changes(tmp_path / "run")] == [[0], [0, 1]]
