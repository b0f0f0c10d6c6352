"""A real elastic run, looked at while a worker is killed, and afterwards."""

from __future__ import annotations

import threading
from typing import Any

import pytest
from elastic_runs import STEPS, settings_of, text_at

from resilin.cluster.elastic_job import JobEnded
from resilin.cluster.faults import Fault
from resilin.cluster.local import worker_command
from resilin.dashboard.follower import Follower
from resilin.run.elastic_start import launch


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """What a page was told again and again while the run went on, and at last."""
    folder = tmp_path_factory.mktemp("watched")
    follower, over = Follower(folder / "run"), threading.Event()
    told: list[dict[str, Any]] = []

    def look() -> None:
        while not over.is_set():
            follower.wanted()
            state = follower.state()
            if not told or told[-1]["version"] != state["version"]:
                told.append(state)
            over.wait(0.02)

    settings = settings_of(
        text_at(folder), train={"steps": STEPS, "batch_size": 8, "micro_batch_size": 1, "threads": 1}
    )
    looking = threading.Thread(target=look)
    looking.start()
    try:
        fault = Fault(1, 3, "forward and backward of micro-batch 1")
        assert launch(settings, folder / "run", worker_command(), faults=[fault]) == JobEnded(0, "")
    finally:
        over.set()
        looking.join()
    after = Follower(folder / "run")
    while after.look():
        pass
    return told, after.state()


def test_while_it_goes_on_the_map_has_what_everyone_does(seen: tuple[list[dict[str, Any]], dict[str, Any]]):
    told = seen[0]
    states = {one["run"]["state"] for one in told}
    assert "running" in states
    assert states <= {"empty", "running", "completed", "failed"}
    doing = {cell["doing"] for one in told for stage in one["map"].get("stages", ()) for cell in stage["members"]}
    assert any("micro-batch" in words or "gradients" in words or "waiting" in words for words in doing), doing
    assert [one["steps"] for one in told] == sorted(one["steps"] for one in told)


def test_the_loss_is_a_change_with_all_its_parts(seen: tuple[list[dict[str, Any]], dict[str, Any]]):
    state = seen[1]
    loss = next(change for change in state["changes"] if change["kind"] == "loss")
    assert loss["lost"] == [{"member": 1, "why": "was killed by SIGKILL"}]
    took = {one["part"]: one["seconds"] for one in loss["timeline"]}
    assert {"detect", "halt", "edit", "replan", "restore", "migrate", "verify", "redo"} <= set(took)
    assert loss["gap"] > 0
    for number, parts in loss["parts"].items():
        assert int(number) in loss["after"]
        assert {"groups", "engine", "plan", "load", "verify"} <= set(parts)
    assert {"restore", "migrate"} <= {part for one in loss["bytes"].values() for part in one}
    assert any(mark["kind"] == "loss" and mark["step"] == loss["step"] for mark in state["marks"])


def test_parts_fit_into_the_time_from_the_last_that_came_out_to_the_last_that_was_ready(
    seen: tuple[list[dict[str, Any]], dict[str, Any]],
):
    for change in seen[1]["changes"]:
        total = sum(one["seconds"] for one in change["timeline"] if one["part"] not in ("detect", "halt", "redo"))
        slowest = sum(change["parts"][str(change["slowest"])].values())
        assert 0 < slowest <= total + 1e-3


def test_afterwards_the_page_knows_how_it_ended(seen: tuple[list[dict[str, Any]], dict[str, Any]]):
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
