"""The runner on runs of a few steps: reading back, resuming, stopping, and the files it writes."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import signal
from pathlib import Path

import pytest
from rich.console import Console

from resilin.config import SettingsError
from resilin.recipes import execute, readme, reproduce
from resilin.recipes.cells import cells
from resilin.recipes.execute import Job, RunFailedError, read_record, train
from resilin.recipes.findings import Claim, Findings, Line, Plot, Row, Study, Table
from resilin.recipes.recipe import load_recipe
from resilin.recipes.reproduce import Request
from resilin.recipes.results import read_results, write_results
from resilin.recipes.sweep import sweep
from resilin.run.run import Outcome, Run

RECIPE = """
title = "A trial"
claim = "QK-norm does something."
analysis = "{analysis}"
series = ["loss", "probe/*"]
paper = {{ title = "p", year = 2023, arxiv = "2309.14322", figures = [{{ finding = "f", figure = "12.5" }}] }}
[settings.source]
use = "resilin.recipes.standard_library:StandardLibrary"
bytes = 20000
sequence_length = 8
cache = "{cache}"
[settings]
model = {{ hidden_size = 16, layers = 1, heads = 2 }}
train = {{ steps = 4, batch_size = 4, device = "cpu" }}
evaluation = {{ every = 4, batches = 2, at_start = true }}
checkpoint.every = 0
log = {{ tensorboard = false, live = false }}
precision.compute = "fp32"
[arms.baseline]
[arms.method]
model.qk_norm = "layer"
[compare]
metric = "nll"
[presets.cpu]
seeds = [0, 1]
threads = 1
"""

ONE_ARM = """
settings.train.steps = 1
settings.evaluation.every = 1
grids.main.arms = ["baseline"]
"""


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("data")


@pytest.fixture
def request_of(tmp_path: Path, cache: Path):
    folder = tmp_path / "recipes" / "trial"
    folder.mkdir(parents=True)

    def make(analysis: str = "resilin.recipes.compare:compare", more: str = "", **changes) -> Request:
        (folder / "recipe.toml").write_text(RECIPE.format(analysis=analysis, cache=cache) + more)
        return Request(folder, runs=tmp_path / "runs", **changes)

    return make


def quiet() -> Console:
    return Console(file=io.StringIO(), width=200)


def job_of(request: Request, hash_: str = "a") -> Job:
    recipe = load_recipe(request.folder)
    cell = next(cells(recipe, "cpu"))
    return Job(hash_, str(cell), cell.settings, request.runs / hash_, recipe.series)


def forbid(*args, **kwargs):
    raise AssertionError("a run was trained again")


def test_a_repeated_reproduction_trains_nothing_and_finds_the_same(request_of, monkeypatch):
    request = request_of()
    first = reproduce.reproduce(request, quiet())
    assert {run.status for run in first.runs} == {"finished"}
    assert len({run.hash for run in first.runs}) == 4
    monkeypatch.setattr(execute, "start_run", forbid)
    second = reproduce.reproduce(request, quiet())
    assert second.findings == first.findings
    assert second.runs == first.runs
    monkeypatch.undo()
    calls = []
    monkeypatch.setattr(execute, "start_run", lambda *a, **k: calls.append(1) or forbid())
    with pytest.raises(AssertionError):
        reproduce.reproduce(request_of(fresh=True), quiet())
    assert calls


def test_finished_runs_keep_their_record_and_no_checkpoints(request_of):
    results = reproduce.reproduce(request_of(seeds=1), quiet())
    for run in results.runs:
        folder = request_of().runs / "trial" / run.hash
        assert (folder / "record.json").exists()
        assert not (folder / "checkpoints").exists()
        assert (folder / "settings.toml").exists()


def test_an_interrupted_run_resumes_to_the_same_record(request_of):
    request = request_of()
    whole = train(job_of(request, "whole"), threads=1)
    cut = job_of(request, "cut")

    def interrupt(step: int) -> None:
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    assert train(cut, 1, interrupt) is None
    assert not cut.record_file.exists()
    seen = []
    resumed = train(cut, 1, seen.append)
    assert seen[0] == 2  # it went on from the save
    assert resumed.series["loss"] == whole.series["loss"]
    assert resumed.evaluations == whole.evaluations


def test_what_other_settings_began_is_begun_anew(request_of):
    job = job_of(request_of())
    whole = train(job_of(request_of(), "whole"), threads=1)
    stop = lambda step: os.kill(os.getpid(), signal.SIGTERM) if step == 2 else None  # noqa: E731
    other = job.settings.optimizer.model_copy(update={"lr": 0.5})
    begun = dataclasses.replace(job, settings=job.settings.model_copy(update={"optimizer": other}))
    assert train(begun, 1, stop) is None
    seen = []
    record = train(job, 1, seen.append)
    assert seen[0] == 0
    assert record.series["loss"] == whole.series["loss"]


def test_a_record_made_by_other_settings_or_series_is_not_believed(request_of):
    request = request_of()
    job = job_of(request)
    record = train(job, 1)
    assert read_record(job) == record
    assert read_record(Job(job.hash, job.label, job.settings, job.folder, ("loss",))) is None
    tree = json.loads(job.record_file.read_text())
    tree["settings"]["optimizer"]["lr"] *= 2  # as if the default had been another then
    job.record_file.write_text(json.dumps(tree))
    assert read_record(job) is None
    again = train(job, 1)
    assert again.series == record.series
    del tree["settings"]["optimizer"]  # as if the setting had not existed then
    job.record_file.write_text(json.dumps(tree))
    assert read_record(job) is not None


def test_a_damaged_record_is_an_error_that_says_what_to_do(request_of):
    job = job_of(request_of())
    train(job, 1)
    job.record_file.write_text("{")
    with pytest.raises(SettingsError, match="remove the folder"):
        train(job, 1)


def test_a_run_that_diverges_to_nan_is_a_record_too(request_of):
    results = reproduce.reproduce(request_of(overrides=("optimizer.lr=1e30",), seeds=1), quiet())
    assert {run.status for run in results.runs} == {"non-finite"}
    assert all(run.stopped_at is not None and run.final == {} for run in results.runs)
    assert all(row.value is None for row in results.findings.rows)
    assert not any(claim.holds for claim in results.findings.claims)


def test_a_run_that_fails_otherwise_is_named_and_leaves_no_record(request_of, monkeypatch):
    request = request_of(seeds=1, more=ONE_ARM)
    begin = execute.start_run

    def fail(*args, **kwargs):
        run, outcome = begin(*args, **kwargs)
        return run, dataclasses.replace(outcome, reason="failed", message="the disk is full")

    monkeypatch.setattr(execute, "start_run", fail)
    with pytest.raises(RunFailedError, match=r"main baseline seed=0 .*the disk is full"):
        reproduce.reproduce(request, quiet())
    monkeypatch.undo()
    monkeypatch.setattr(Run, "train", lambda run: Outcome("completed", run.step, {}, None))  # complete already
    assert reproduce.reproduce(request, quiet()).runs[0].status == "finished"


def test_two_processes_find_what_one_finds(request_of):
    one = reproduce.reproduce(request_of(more=ONE_ARM), quiet())
    two = reproduce.reproduce(request_of(more="processes = 2\n" + ONE_ARM, fresh=True), quiet())
    assert two.processes == 2
    assert [run.final for run in two.runs] == [run.final for run in one.runs]
    assert two.findings == one.findings


def test_a_reduced_reproduction_leaves_the_recipes_own_results_alone(request_of):
    request = request_of()
    reproduce.reproduce(request, quiet())
    before = (request.folder / "results.json").read_text()
    reduced = request_of(seeds=1)
    results = reproduce.reproduce(reduced, quiet())
    assert results.seeds == (0,)
    assert (request.folder / "results.json").read_text() == before
    assert read_results(reduced.runs / "trial" / "results.json").seeds == (0,)
    changed = request_of(overrides=("train.steps=2",))
    assert reproduce.reproduce(changed, quiet()).command == "resilin reproduce trial train.steps=2"
    assert (request.folder / "results.json").read_text() == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"preset": "cup"}, "did you mean 'cpu'"),
        ({"seeds": 0}, "at least one seed"),
        ({"analysis": "resilin.recipes.nowhere:f"}, "cannot be imported"),
        ({"analysis": "resilin.recipes.compare:f"}, "has no 'f'"),
        ({"more": 'needs = "cuda"\n'}, "needs a CUDA device"),
    ],
)
def test_what_cannot_be_reproduced_is_refused_before_the_first_run(request_of, monkeypatch, changes, message):
    monkeypatch.setattr(execute, "start_run", forbid)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SettingsError, match=message):
        reproduce.reproduce(request_of(**changes), quiet())


def two_sided(study: Study) -> Findings:
    """An analysis with one claim that holds and one that does not."""
    return Findings(
        rows=(Row.over_seeds("figure", [1.0, 2.0], "nat", "1.4"), Row.over_seeds("lost", [1.0, float("nan")])),
        claims=(
            Claim(name="rises", statement="it rises", holds=True, evidence="1 then 2"),
            Claim(name="falls", statement="it falls", holds=False, evidence="1 then 2"),
        ),
        tables=(Table(title="T", columns=("a", "b"), rows=(("x|y", 0.123456),)),),
        plots=(Plot(title="P", x_label="x", y_label="y", lines=(Line(label="l", x=(1.0, 2.0), y=(1.0, None)),)),),
        notes=("note one",),
    )


@pytest.fixture
def reported(request_of, monkeypatch):
    request = request_of(more=ONE_ARM)
    monkeypatch.setattr(reproduce, "load_analysis", lambda path: two_sided)
    (request.folder / "README.md").write_text(
        "# Trial\n\nMine.\n\n<!-- results -->\nout of date\n<!-- /results -->\n\nAfter.\n"
    )
    return request, reproduce.reproduce(request, quiet())


def test_the_readme_says_plainly_what_does_not_hold_beside_the_papers_figures(reported):
    request, results = reported
    text = (request.folder / "README.md").read_text()
    assert text.startswith("# Trial\n\nMine.\n\n<!-- results -->")
    assert text.endswith("<!-- /results -->\n\nAfter.\n")
    assert "out of date" not in text
    assert "1 of 2 claims hold; **not seen here: falls.**" in text
    assert "| it falls | **no** | 1 then 2 |" in text
    assert "| figure | 1.5 ± 0.71 nat | 2 | 1.4 |" in text
    assert "| lost | not finite | 2 |" in text
    assert "| x\\|y | 0.1235 |" in text
    assert "| f | 12.5 |" in text
    assert results.commit == "" or results.commit.split("+")[0].isalnum()


def test_the_readme_comes_from_the_results_file_alone(reported):
    request, results = reported
    first = (request.folder / "README.md").read_text()
    readme.write_readme(request.folder)
    assert (request.folder / "README.md").read_text() == first
    changed = results.findings.claims[1].model_copy(update={"evidence": "changed in the file"})
    findings = results.findings.model_copy(update={"claims": (results.findings.claims[0], changed)})
    write_results(request.folder / "results.json", results.model_copy(update={"findings": findings}))
    readme.write_readme(request.folder)
    assert "changed in the file" in (request.folder / "README.md").read_text()


def test_results_are_strict_json_and_name_machine_versions_and_seeds(reported):
    request, results = reported

    def refuse(word: str):
        raise AssertionError(f"{word} is not JSON")

    tree = json.loads((request.folder / "results.json").read_text(), parse_constant=refuse)
    assert tree["seeds"] == [0, 1]
    assert tree["machine"]["cores"] >= 1
    assert tree["versions"]["torch"].startswith("2.")
    assert tree["settings"]["train"]["steps"] == 4
    assert read_results(request.folder / "results.json") == results


def test_a_readme_without_markers_is_refused(request_of):
    request = request_of(more=ONE_ARM)
    (request.folder / "README.md").write_text("# Trial\n")
    with pytest.raises(SettingsError, match="should hold the lines"):
        reproduce.reproduce(request, quiet())


def test_the_picture_is_drawn_where_matplotlib_is_there(reported):
    pytest.importorskip("matplotlib")
    request, _ = reported
    assert (request.folder / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert "plot.png" in (request.folder / "README.md").read_text()


def test_a_sweep_from_python_covers_sizes_rates_interventions_and_seeds(request_of, tmp_path, cache):
    base = load_recipe(request_of().folder).settings
    study = sweep(
        base,
        sizes={"small": {"model": {"hidden_size": 8}}, "large": {"model": {"hidden_size": 16}}},
        lrs=(1e-3, 1e-2),
        patches={"none": {}, "qk_norm": {"model": {"qk_norm": "layer"}}},
        seeds=(0,),
        runs=tmp_path / "sweep",
        threads=1,
        console=quiet(),
    )
    assert len(study.trials) == 8
    small = study.select(arm="none", size="small", lr=1e-3)
    assert len(small) == 1
    assert small[0].record.non_embedding < study.select(size="large")[0].record.non_embedding
    assert all(t.record.initial["nll"] > 0 and t.record.final["nll"] > 0 for t in study.trials)
