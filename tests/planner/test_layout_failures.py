"""What failures cost a planned layout: the study follows from its settings, or says what is missing."""

from __future__ import annotations

from pathlib import Path

import pytest

from resilin.config import UserError
from resilin.planner.long_run import study
from resilin.planner.long_run.choose import with_machine
from resilin.planner.long_run.from_layout import arrangement_of, study_of_layout
from resilin.planner.long_run.study import job_of

MODEL = """
[model]
vocab_size = 50304
hidden_size = 2048
layers = 24
heads = 16
max_positions = 2048
{more}
[source]
use = "resilin.data.packed:Shards"
path = "/data/tokens"
sequence_length = 2048
[train]
batch_size = 64
micro_batch_size = 1
{steps}
[precision]
compute = "bf16"
[parallel]
"""


def written(folder: Path, parallel: str, steps: str = "steps = 1000", more: str = "") -> Path:
    file = folder / "planned.toml"
    file.write_text(MODEL.format(steps=steps, more=more) + parallel, encoding="utf-8")
    return file


def test_stages_of_several_machines_share_what_is_lost(tmp_path: Path) -> None:
    made = study_of_layout(
        written(tmp_path, "data = 8\ntensor = 2\npipeline = 2"), "dgx-a100-40", ["job.micro_batch=2"], 2
    )
    job, cluster = made.study.job, made.study.cluster
    assert (job.stages, job.tensor, job.micro_batches, job.micro_batch) == (2, 2, 8, 2)
    assert (cluster.machines, cluster.devices, job.steps) == (4, 8, 1000)
    assert job.step_seconds == made.step.seconds
    assert job_of(made.study).intact == pytest.approx(made.step.seconds)
    assert made.study.failures.machine is not None
    assert made.study.failures.machine.mean_hours == 48
    played = study(with_machine(made.study.model_copy(update={"ways": dict(list(made.study.ways.items())[-2:])})))
    assert all(0 < line.outcome.goodput <= 1 for line in played.lines)


def test_several_stages_on_a_machine_are_one_part(tmp_path: Path) -> None:
    made = study_of_layout(written(tmp_path, "data = 2\ntensor = 1\npipeline = 8"), "dgx-a100-40")
    assert made.study.cluster.machines == 2
    assert set(made.study.ways) == {"restart, waiting", "restart on the rest", "restart on the rest, hourly"}
    assert set(made.study.job.measured) == {"1", "2"}
    assert made.study.job.measured["2"] == made.step.seconds < made.study.job.measured["1"]
    assert made.study.job.least == 1
    assert "holds what no other one has" in made.notes[0]


def test_a_model_that_fewer_machines_cannot_hold_waits(tmp_path: Path) -> None:
    """13 billion parameters in 20 bytes each: two machines of 320 GB hold them, one without host memory does not."""
    file = written(
        tmp_path,
        "data = 1\ntensor = 8\npipeline = 4\nsharding = 'fsdp'",
        more="recompute = 'block'",
    )
    text = file.read_text().replace("hidden_size = 2048", "hidden_size = 8192").replace("layers = 24", "layers = 40")
    file.write_text(text.replace("heads = 16", "heads = 64"), encoding="utf-8")
    made = study_of_layout(file, "dgx-a100-40", losses_a_day=1)
    assert made.study.job.least > 1
    assert "1" not in made.study.job.measured


@pytest.mark.parametrize(
    ("parallel", "more", "said"),
    [
        ("data = 12", {}, "do not fill whole machines of 8"),
        ("data = 'auto'", {}, "every degree as a number"),
        ("data = 8\ntensr = 2", {}, "did you mean 'tensor'"),
        ("data = 8\npipeline = 2", {"steps": ""}, "how long is the run"),
        ("data = 8\ntensor = 2", {"cluster": "frontier"}, "how often do machines fail"),
    ],
)
def test_what_cannot_be_a_study_is_refused(tmp_path: Path, parallel: str, more: dict[str, str], said: str) -> None:
    given = {"cluster": "dgx-a100-40", "steps": "steps = 10", **more}
    with pytest.raises(UserError, match=said):
        study_of_layout(written(tmp_path, parallel, given["steps"]), given["cluster"])


def test_the_layout_is_that_of_the_file(tmp_path: Path) -> None:
    raw = {
        "parallel": {"workers": 4, "data": 2, "pipeline": 2, "schedule": "gpipe"},
        "train": {"micro_batch_size": 3},
        "model": {"recompute": "block", "offload": "host"},
        "precision": {"compute": "fp16"},
    }
    plan = arrangement_of(raw, tmp_path)
    assert (plan.micro, plan.recompute, plan.offload, plan.compute) == (3, "block", "host", "fp16")
    assert (plan.degrees.data, plan.degrees.pipeline, plan.parallel.schedule) == (2, 2, "gpipe")
