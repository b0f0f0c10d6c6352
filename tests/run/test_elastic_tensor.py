"""Elastic runs whose matrices are cut over teams of workers, beside runs of as many parts that nothing happened to."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest
from elastic_checks import changes, check_same, equal, events, states
from elastic_runs import STEPS, alone, go, settings_of

from resilin.cluster.elastic_job import ElasticJob, JobEnded
from resilin.cluster.faults import Fault
from resilin.parallel.errors import ParallelError
from resilin.run.events import Cluster, Event, StepDone


def cut(text: Path, workers: int = 4, **over: Any):
    parallel = {"workers": workers, "tensor": 2, **over.pop("parallel", {})}
    return settings_of(text, parallel=parallel, **over)


@pytest.fixture(scope="module")
def undisturbed(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One team, to which nothing happens."""
    folder = tmp_path_factory.mktemp("elastic") / "one"
    assert go(cut(text, 2), folder) == JobEnded(0, "")
    return folder


def test_teams_compute_what_one_process_does(text: Path, undisturbed: Path, tmp_path: Path):
    one = alone(text, tmp_path / "one")
    found, expected = ([e["loss"] for e in events(at, "step")] for at in (undisturbed, one))
    assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
def test_a_newcomer_that_waits_makes_a_team_with_who_is_left_over_and_the_bits_stay(text: Path, tmp_path: Path):
    def watch(job: ElasticJob, event: Event) -> None:
        if isinstance(event, StepDone) and event.step == 1:
            job.add()
        if isinstance(event, Cluster) and event.what == "ready":  # of a team by itself it cannot be one
            job.signal(1, signal.SIGKILL)

    ended = go(cut(text, train={"steps": 100}), tmp_path / "run", watch=watch)
    one = go(cut(text, 2, train={"steps": 100}), tmp_path / "one")
    assert (ended, one) == (JobEnded(0, ""), JobEnded(0, ""))
    check_same(tmp_path / "run", tmp_path / "one", 100)
    happened = changes(tmp_path / "run")
    assert [change["members"] for change in happened] == [[0, 1, 2, 3], [2, 3, 0, 4]]
    assert [change["redone"] for change in happened] == [0, 0]


@pytest.mark.slow
def test_who_is_left_over_waits_until_a_team_can_be_made_and_the_bits_stay(text: Path, tmp_path: Path):
    done: list[str] = []

    def watch(job: ElasticJob, event: Event) -> None:
        if isinstance(event, Cluster) and event.what == "spare" and not done:
            job.add()
            done.append("added")

    ended = go(cut(text, train={"steps": 140}), tmp_path / "run", [Fault(1, 3, "forward")], watch=watch)
    one = go(cut(text, 2, train={"steps": 140}), tmp_path / "one")
    assert (ended, one) == (JobEnded(0, ""), JobEnded(0, ""))
    check_same(tmp_path / "run", tmp_path / "one", 140)
    happened = changes(tmp_path / "run")
    assert [change["members"] for change in happened] == [[0, 1, 2, 3], [2, 3], [2, 3, 0, 4]]
    assert [change["redone"] for change in happened] == [0, 0, 0]


@pytest.mark.parametrize(
    "faults",
    [
        [Fault(2, 4, "adding gradients up"), Fault(0, 4, "reading its states from copies")],  # while it recovers
        pytest.param([Fault(3, 2, "updating weights"), Fault(4, 9, "copying its states")], marks=pytest.mark.slow),
    ],
    ids=["recovery", "update"],
)
def test_two_that_are_left_over_make_a_team(faults: list[Fault], text: Path, undisturbed: Path, tmp_path: Path):
    assert go(cut(text, 6, cluster={"copies": 2}), tmp_path / "run", faults) == JobEnded(0, "")
    check_same(tmp_path / "run", undisturbed)
    happened = changes(tmp_path / "run")
    assert len(happened[0]["members"]) == 6
    assert len(happened[-1]["members"]) == 4
    assert all(change["redone"] <= 1 for change in happened)


@pytest.mark.parametrize(
    "model",
    [
        pytest.param({"tie_embeddings": True, "kv_heads": 1}, id="tied, one key head", marks=pytest.mark.slow),
        pytest.param({"recompute": "block", "qk_norm": "rms"}, id="recomputed", marks=pytest.mark.slow),
    ],
)
def test_other_models_are_cut_too(model: dict[str, Any], text: Path, tmp_path: Path):
    assert go(cut(text, 2, model=model), tmp_path / "one") == JobEnded(0, "")
    ended = go(cut(text, model=model), tmp_path / "run", [Fault(0, 6, "adding gradients up")])
    assert ended == JobEnded(0, "")
    check_same(tmp_path / "run", tmp_path / "one")


@pytest.mark.slow
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_stages_of_teams(tied: bool, text: Path, tmp_path: Path):
    """A stage that has lost its only team is given one of the other's."""
    more: dict[str, Any] = {"model": {"layers": 4, "tie_embeddings": tied}}
    assert go(cut(text, 4, parallel={"pipeline": 2}, **more), tmp_path / "one") == JobEnded(0, "")
    faults = [Fault(5, 5, "backward of stage 1 micro-batch 2")]
    ended = go(cut(text, 6, parallel={"pipeline": 2}, **more), tmp_path / "run", faults)
    assert ended == JobEnded(0, "")
    check_same(tmp_path / "run", tmp_path / "one")
    assert [change["stages"] for change in changes(tmp_path / "run")][:2] == [[[0, 1, 2, 3], [4, 5]], [[0, 1], [2, 3]]]


@pytest.mark.slow
def test_a_checkpoint_of_teams_is_resumed_without_them(text: Path, tmp_path: Path):
    constant = {"schedule": {"use": "resilin.optim.schedule:Constant"}}
    half = cut(text, optimizer=constant, train={"steps": 8})
    assert go(half, tmp_path / "run", [Fault(1, 6, "adding gradients up")]) == JobEnded(0, "")
    whole = settings_of(text, optimizer=constant)
    assert go(whole, tmp_path / "run", resume=True, accept_changes=True) == JobEnded(0, "")
    one = alone(text, tmp_path / "one", optimizer=constant)
    mine, theirs = states(tmp_path / "run", STEPS)["model"], states(one, STEPS)["model"]
    assert mine.keys() == theirs.keys()
    assert not equal(mine, states(one, 4)["model"])
    for name, weight in theirs.items():
        assert (mine[name] - weight).abs().max() < 1e-4, name


def test_the_last_team_ends_the_run_with_what_is_needed(text: Path, tmp_path: Path):
    ended = go(cut(text, 2), tmp_path / "run", [Fault(1, 5, "forward")])
    assert ended.code != 0
    assert "of teams of 2 (parallel.tensor)" in str(ended)


@pytest.mark.parametrize(
    ("over", "match"),
    [
        ({"parallel": {"workers": 3}}, "3 workers are no whole teams of 2"),
        ({"parallel": {"workers": 2, "pipeline": 2}}, "2 workers cannot hold 2 pipeline stages of teams of 2"),
        ({"precision": {"compile": True}}, "set precision.compile = false"),
        ({"parallel": {"context": 2, "tensor": 1}}, "other kinds of parallelism need elastic = false"),
    ],
)
def test_what_teams_cannot_do_is_refused(over: dict[str, Any], match: str, text: Path, tmp_path: Path):
    with pytest.raises(ParallelError, match=match):
        go(cut(text, **over), tmp_path / "run")
