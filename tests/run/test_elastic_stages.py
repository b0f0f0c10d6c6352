"""Elastic runs whose model is divided into stages, beside one process that nothing ever happened to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from elastic_runs import changes, check_same, go, settings_of, text_at

from resilin.cluster.elastic_job import JobEnded
from resilin.cluster.faults import Fault
from resilin.run.start import start_run

MODEL = {"layers": 4}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return text_at(tmp_path_factory.mktemp("elastic"))


@pytest.fixture(scope="module")
def undisturbed(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One process, to which nothing happens."""
    folder = tmp_path_factory.mktemp("elastic") / "one"
    settings = settings_of(text, model=MODEL, parallel={"workers": 0}, cluster={"elastic": False})
    assert start_run(settings, folder)[1].reason == "completed"
    return folder


def staged(text: Path, workers: int = 4, stages: int = 2, **over: Any):
    parallel = {"workers": workers, "pipeline": stages, **over.pop("parallel", {})}
    return settings_of(text, model=MODEL, parallel=parallel, **over)


@pytest.mark.parametrize(
    "faults",
    [
        [],
        [Fault(1, 3, "forward of stage 0 micro-batch 3"), Fault(2, 8, "backward of stage 1 micro-batch 3")],
        [Fault(3, 2, "updating weights"), Fault(0, 9, "copying its states")],
        [Fault(2, 4, "adding gradients up"), Fault(0, 4, "reading its states from copies")],  # while it recovers
    ],
    ids=["none", "passes", "update", "recovery"],
)
def test_stages_lose_members_and_the_bits_are_those_of_one_process(
    faults: list[Fault], text: Path, undisturbed: Path, tmp_path: Path
):
    assert go(staged(text), tmp_path / "run", faults) == JobEnded(0, "")
    check_same(tmp_path / "run", undisturbed)
    happened = changes(tmp_path / "run")
    assert len(happened) >= 1 + len(faults)
    assert all(change["redone"] <= 1 for change in happened)
    assert [len(stage) for stage in happened[0]["stages"]] == [2, 2]
