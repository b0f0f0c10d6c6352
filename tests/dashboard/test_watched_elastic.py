"""A real elastic run, looked at while a worker is killed, and afterwards."""

from __future__ import annotations

import signal
import threading
import time
from typing import Any

import pytest
from elastic_runs import STEPS, check_met, settings_of, text_at

from resilin.cluster.elastic_job import ElasticJob, JobEnded
from resilin.cluster.faults import Fault
from resilin.cluster.local import worker_command
from resilin.dashboard.follower import Follower
from resilin.run.elastic_start import launch
from resilin.run.events import Event

Seen = tuple[dict[str, Any], dict[str, Any]]


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> Seen:
    """What a page was told while worker 1 stood still, and after it was killed and the run had ended."""
    folder = tmp_path_factory.mktemp("watched")
    follower, jobs, told, over = Follower(folder / "run"), [], [], threading.Event()

    def look() -> None:
        while not told and not over.is_set():
            follower.look()
            state = follower.state()
            cells = [cell for stage in state["map"].get("stages", ()) for cell in stage["members"]]
            if state["steps"] == 3 and [cell["step"] for cell in cells[::2]] == [3, 3]:
                told.append(state)
            time.sleep(0.02)
        if told:
            jobs[0].signal(1, signal.SIGKILL)

    looking = threading.Thread(target=look)
    looking.start()
    fault = Fault(1, 3, "adding gradients up", "stop")
    settings = settings_of(text_at(folder), cluster={"silence": 600})

    def watch(job: ElasticJob, event: Event) -> None:
        jobs.append(job)

    try:
        ended = launch(settings, folder / "run", worker_command(), faults=[fault], watch=watch)
    finally:
        over.set()
        looking.join()
    assert ended == JobEnded(0, "")
    check_met(folder / "run", [fault])
    after = Follower(folder / "run")
    while after.look():
        pass
    return told[0], after.state()


def test_while_it_goes_on_the_map_has_what_everyone_does(seen: Seen):
    state = seen[0]
    assert (state["run"]["state"], state["run"]["phase"], state["run"]["workers"]) == ("running", "running", 3)
    (stage,) = state["map"]["stages"]
    assert [(cell["number"], cell["state"]) for cell in stage["members"]] == [(n, "running") for n in range(3)]
    assert all(cell["doing"] for cell in stage["members"])
    assert [cell["copies_at"] for cell in stage["members"]] == [[1], [2], [0]]


def test_the_loss_is_a_change_with_all_its_parts(seen: Seen):
    state = seen[1]
    loss = next(change for change in state["changes"] if change["kind"] == "loss")
    (lost,) = loss["lost"]
    assert lost["member"] == 1
    assert lost["why"] in ("was killed by SIGKILL", "lost its connection")  # whichever is noticed first
    took = {one["part"]: one["seconds"] for one in loss["timeline"]}
    assert {"detect", "halt", "edit", "replan", "restore", "verify", "redo"} <= set(took)
    assert loss["gap"] > 0
    for number, parts in loss["parts"].items():
        assert int(number) in loss["after"]
        assert {"groups", "engine", "plan", "load", "verify"} <= set(parts)
    assert "restore" in {part for one in loss["bytes"].values() for part in one}  # those who stay keep their own
    assert any(mark["kind"] == "loss" and mark["step"] == loss["step"] for mark in state["marks"])


def test_parts_fit_into_the_time_from_the_last_that_came_out_to_the_last_that_was_ready(
    seen: Seen,
):
    for change in seen[1]["changes"]:
        total = sum(one["seconds"] for one in change["timeline"] if one["part"] not in ("detect", "halt", "redo"))
        slowest = sum(change["parts"][str(change["slowest"])].values())
        assert 0 < slowest <= total + 1e-3


def test_afterwards_the_page_knows_how_it_ended(seen: Seen):
    state = seen[1]
    assert (state["run"]["state"], state["run"]["step"], state["steps"]) == ("completed", STEPS, STEPS)
    assert len(state["run"]["digest"]) == 16
    assert state["trouble"] == ""
    (stage,) = state["map"]["stages"]
    assert sorted(n for one in stage["members"] for low, high in one["shards"] for n in range(low, high + 1)) == list(
        range(stage["shards"])
    )
    assert [n for one in stage["members"] for n in range(one["micros"][0], one["micros"][1] + 1)] == list(range(8))
    assert set(state["evaluations"]) == {"validation"}
