"""Elastic runs whose workers have the experts of each layer between them, beside one process that has all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from elastic_checks import changes, check_close, states
from elastic_runs import STEPS, alone, go, go_with_a_newcomer, settings_of

from resilin.cluster.elastic_job import JobEnded
from resilin.cluster.faults import Fault
from resilin.parallel.errors import ParallelError

MOE: dict[str, Any] = {"moe": {"experts": 6, "expert_size": 16, "experts_per_token": 2}}
STAGES: dict[str, Any] = {"pipeline": 2}


def shared(text: Path, workers: int = 3, expert: int = 3, **over: Any):
    parallel = {"workers": workers, "expert": expert, **over.pop("parallel", {})}
    return settings_of(text, parallel=parallel, model=MOE | over.pop("model", {}), **over)


def alone_with(text: Path, folder: Path, more: dict[str, Any]) -> Path:
    kept = {section: values for section, values in more.items() if section != "parallel"}
    return alone(text, folder, **kept | {"model": MOE | more.get("model", {})})


@pytest.fixture(scope="module")
def one(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One process, to which nothing happens."""
    return alone(text, tmp_path_factory.mktemp("elastic") / "one", model=MOE)


def test_workers_with_experts_between_them_compute_what_one_process_does(text: Path, one: Path, tmp_path: Path):
    assert go(shared(text), tmp_path / "run") == JobEnded(0, "")
    check_close(tmp_path / "run", one)


@pytest.mark.parametrize(
    ("workers", "expert", "faults", "sharing"),
    [
        (3, 3, [Fault(1, 4, "forward")], [3, 2]),
        (2, 2, [Fault(0, 5, "adding gradients up")], [2, 1]),  # who is left has all experts, and computes by itself
        # Two sets of experts, then one among three, then one among two.
        (4, 2, [Fault(3, 3, "updating weights"), Fault(0, 9, "copying its states")], [2, 3, 2]),
        pytest.param(3, 2, [Fault(2, 4, "forward"), Fault(0, 4, "reading its states")], [3, 1], marks=pytest.mark.slow),
        pytest.param(6, 3, [Fault(1, 2, "backward"), Fault(2, 7, "backward")], [3, 5, 4], marks=pytest.mark.slow),
    ],
)
def test_lost_experts_are_the_others(
    workers: int, expert: int, faults: list[Fault], sharing: list[int], text: Path, one: Path, tmp_path: Path
):
    settings = shared(text, workers, expert, cluster={"copies": 2})
    assert go(settings, tmp_path / "run", faults) == JobEnded(0, "")
    check_close(tmp_path / "run", one)
    stages = [change["view"]["stages"][0] for change in changes(tmp_path / "run")]
    assert [stage["sharing"] for stage in stages] == sharing
    for stage in stages:
        counts = [stage["experts"].count(place) for place in range(stage["sharing"])]
        assert max(counts) - min(counts) <= 1
    assert all(change["redone"] <= 1 for change in changes(tmp_path / "run"))


@pytest.mark.parametrize(
    ("workers", "more", "sharing"),
    [
        (2, {}, [2, 3]),
        # One set among five, then three sets: the five get more experts too.
        pytest.param(5, {}, [5, 2], marks=pytest.mark.slow),
        pytest.param(2, {"model": {"tie_embeddings": True}}, [2, 3], marks=pytest.mark.slow),
        pytest.param(3, {"optimizer": {"use": "resilin.optim.muon:Muon", "lr": 1e-3}}, [3, 2], marks=pytest.mark.slow),
        (4, {"parallel": STAGES}, [2, 3]),
    ],
    ids=["one set", "three sets", "tied", "muon", "stages"],
)
def test_a_newcomer_is_given_its_share_of_the_experts_and_nobody_waits_for_what_is_read(
    workers: int, more: dict[str, Any], sharing: list[int], text: Path, tmp_path: Path
):
    settings = shared(text, workers, 2, cluster={"silence": 60}, **more)
    assert go_with_a_newcomer(settings, tmp_path / "run") == JobEnded(0, "")
    check_close(tmp_path / "run", alone_with(text, tmp_path / "one", more))
    before, after = (change["view"]["stages"][0] for change in changes(tmp_path / "run"))
    assert [before["sharing"], after["sharing"]] == sharing
    counts = [after["experts"].count(place) for place in range(after["sharing"])]
    assert max(counts) - min(counts) <= 1
    joined = changes(tmp_path / "run")[-1]
    assert (joined["version"], joined["redone"]) == (3, 0)
    assert joined["kept"] >= 8, "nothing is computed twice"
    assert sum(read["migrate"] for read in joined["bytes"].values()) == 0, "nobody has waited for it"


@pytest.mark.parametrize(
    ("more", "workers"),
    [
        # Of three workers one has no expert; of five, three have no slot.
        ({"model": {"moe": MOE["moe"] | {"experts": 2}}}, 3),
        ({"train": {"batch_size": 2}}, 5),
        pytest.param(
            {"model": {"moe": MOE["moe"] | {"balance": "bias", "shared_size": 8}}, "objective": {"load_balance": 0.0}},
            3, marks=pytest.mark.slow,
        ),
        pytest.param({"model": {"tie_embeddings": True, "recompute": "block"}}, 3, marks=pytest.mark.slow),
        pytest.param({"optimizer": {"use": "resilin.optim.muon:Muon", "lr": 1e-3}}, 4, marks=pytest.mark.slow),
        pytest.param({"train": {"batch_size": 10, "micro_batch_size": 3}}, 4, marks=pytest.mark.slow),
        pytest.param({"parallel": {"tensor": 2}}, 6, marks=pytest.mark.slow),
        ({"parallel": STAGES, "model": {"layers": 4}}, 5),
        # Of three in a stage one has no slot in some of the ticks.
        pytest.param(
            {"parallel": STAGES, "train": {"batch_size": 10, "micro_batch_size": 3}, "model": {"recompute": "block"}},
            4, marks=pytest.mark.slow,
        ),
        pytest.param({"parallel": STAGES, "model": {"tie_embeddings": True}}, 5, marks=pytest.mark.slow),
        pytest.param(
            {"parallel": STAGES, "optimizer": {"use": "resilin.optim.muon:Muon", "lr": 1e-3}}, 5,
            marks=pytest.mark.slow,
        ),
        pytest.param({"parallel": {**STAGES, "tensor": 2}, "model": {"layers": 4}}, 8, marks=pytest.mark.slow),
        pytest.param({"parallel": {"pipeline": 3}, "model": {"layers": 3}}, 6, marks=pytest.mark.slow),
        # Who was alone in the last stage is lost: another one moves there.
        pytest.param({"parallel": STAGES}, 3, marks=pytest.mark.slow),
    ],
    ids=[
        "few experts", "few slots", "balanced", "tied", "muon", "uneven", "tensor", "stages", "uneven stages",
        "tied ends", "muon in stages", "teams in stages", "three stages", "alone",
    ],
)  # fmt: skip
def test_other_runs_are_what_one_process_computes(more: dict[str, Any], workers: int, text: Path, tmp_path: Path):
    settings = shared(text, workers, 2, **more)
    assert go(settings, tmp_path / "run", [Fault(workers - 1, 6, "adding gradients up")]) == JobEnded(0, "")
    check_close(tmp_path / "run", alone_with(text, tmp_path / "one", more))


@pytest.mark.slow
def test_a_checkpoint_is_resumed_by_others(text: Path, tmp_path: Path):
    constant = {"schedule": {"use": "resilin.optim.schedule:Constant"}}
    half = shared(text, 4, 2, optimizer=constant, train={"steps": 8})
    assert go(half, tmp_path / "run", [Fault(1, 6, "adding gradients up")]) == JobEnded(0, "")
    whole = shared(text, 5, 2, optimizer=constant)
    assert go(whole, tmp_path / "run", resume=True, accept_changes=True) == JobEnded(0, "")
    one = alone(text, tmp_path / "one", optimizer=constant, model=MOE)
    mine, theirs = states(tmp_path / "run", STEPS)["model"], states(one, STEPS)["model"]
    for name, weight in theirs.items():
        assert (mine[name] - weight).abs().max() < 2e-4, name


@pytest.mark.parametrize(
    ("over", "match"),
    [
        ({"model": {"moe": None}}, "divides experts, of which this model has none"),
        ({"parallel": {"expert": 7}}, "parallel.expert = 7 divides experts, of which this model has 6"),
        ({"precision": {"compile": True}}, "compiled code of parallel.expert"),
        ({"memory": {"experts": {}}}, "keeps experts on a worker's own disk"),
    ],
)
def test_what_cannot_be_is_refused(over: dict[str, Any], match: str, text: Path, tmp_path: Path):
    with pytest.raises(ParallelError, match=match):
        go(shared(text, **over), tmp_path / "run")
