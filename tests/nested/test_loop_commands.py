"""A looped model as a user trains, looks at, cuts and uses one."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from commands import Done, run_command

from resilin.run.open_model import open_model

SETTINGS = """
name = "looped"
[source]
paths = ["text"]
sequence_length = 32
tokenizer = { kind = "bytes" }
held_out = { by = "tail", fraction = 0.2 }
[model]
hidden_size = 32
layers = 1
heads = 4
mlp_size = 64
max_positions = 128
loop = { times = 4 }
[objective]
use = "resilin.nested.shortcut:Shortcut"
[optimizer]
lr = 0.01
[train]
steps = 20
batch_size = 8
micro_batch_size = 4
threads = 1
device = "cpu"
[precision]
compute = "fp32"
[evaluation]
every = 10
batches = 2
[checkpoint]
every = 10
[log]
tensorboard = false
live = false
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("place")
    (folder / "text").mkdir()
    (folder / "text" / "a.txt").write_text(Path(json.__file__).read_text())
    (folder / "looped.toml").write_text(SETTINGS)
    return folder


@pytest.fixture(scope="module")
def resilin(place) -> Callable[..., Done]:
    return lambda *arguments: run_command(place, arguments)


def events(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def trained(resilin, place):
    done = resilin("train", "looped.toml", "--folder", "runs/looped")
    assert done.returncode == 0, done.stderr
    return place / "runs" / "looped"


def test_a_run_logs_its_parts_and_resumes_to_the_bit(resilin, place, trained):
    steps = [e for e in events(trained) if e["event"] == "step"]
    assert all({"loss_full", "loss_short", "consistency", "loops"} <= e["logs"].keys() for e in steps)
    assert len({e["logs"]["loops"] for e in steps}) == 3
    last = [e for e in events(trained) if e.get("name") == "validation"][-1]["metrics"]
    assert {f"loss_at_{m}" for m in (1, 2, 3, 4)} <= last.keys()
    assert resilin("train", "looped.toml", "--folder", "runs/cut").returncode == 0
    shutil.rmtree(place / "runs" / "cut" / "checkpoints" / "step-00000020")
    assert resilin("train", "looped.toml", "--folder", "runs/cut", "--resume").returncode == 0
    one, two = (open_model(run, device="cpu").model for run in (trained, place / "runs" / "cut"))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))


def test_the_family_of_a_looped_model_is_its_loops(resilin, place, trained):
    shown = resilin("family", str(trained), "--no-timed", "--budget", "loops=2+1+1", "--plot", "loops.png")
    assert shown.returncode == 0, shown.stderr
    assert all(word in shown.stdout for word in ("1 loop", "3 loops", "loops 2 2x1", "mix", "agreement"))
    told = json.loads(resilin("family", str(trained), "--no-timed", "--json").stdout)["members"]
    assert [one["name"] for one in told] == ["1 loop", "2 loops", "3 loops", "4 loops"]
    assert [one["kind"] for one in told] == ["trained", "trained", "mix", "trained"]
    assert [one["kv_bytes_per_token"] // told[0]["kv_bytes_per_token"] for one in told] == [1, 2, 3, 4]
    assert told[-1]["agreement"] == 1.0
    assert resilin("export", str(trained), "whole").returncode == 0
    of_folder = json.loads(resilin("family", "whole", "--no-timed", "--json").stdout)["members"]
    assert [one["kind"] for one in of_folder] == ["untrained", "untrained", "untrained", "trained"]


def test_generating_with_fewer_loops_is_what_the_extracted_model_writes(resilin, place, trained):
    options = ("-p", "import ", "-n", "12", "--temperature", "0", "--json")
    for name, text in (("two", "loops=2"), ("uneven", "loops=2+1+1")):
        done = resilin("extract", str(trained), name, "--budget", text)
        assert done.returncode == 0, done.stderr
        assert "layers are looped" in done.stdout
        one = json.loads(resilin("generate", str(trained), "--budget", text, *options).stdout)
        assert one == json.loads(resilin("generate", name, *options).stdout) | {"logprobs": one["logprobs"]}
    whole = resilin("generate", str(trained), *options[:-1])
    drafted = resilin("generate", str(trained), "--draft", "loops=1", *options[:-1])
    assert drafted.stdout.rstrip() == whole.stdout.rstrip()
    per_loop = json.loads(resilin("family", str(trained), "--no-timed", "--json").stdout)["members"][1][
        "flops_per_token"
    ]
    assert resilin("extract", str(trained), "fits", "--flops", str(per_loop)).returncode == 0
    assert open_model(place / "fits", device="cpu").model.settings.loop.times == 2


def workers(place: Path, folder: str, *layout: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "resilin", "train", "looped.toml", "--folder", folder, "--workers", "2", *layout]
    return subprocess.run(command, cwd=place, capture_output=True, text=True, timeout=200, check=False)


@pytest.mark.parametrize(
    ("layout", "exact"),
    [
        pytest.param("parallel.data=2", True, marks=pytest.mark.slow),
        pytest.param("parallel.sharding=fsdp", False, marks=pytest.mark.slow),
        pytest.param("parallel.tensor=2", False, marks=pytest.mark.slow),
    ],
)
def test_workers_train_the_same_looped_model(place, trained, layout, exact):
    """Real processes; blocks that FSDP gathers for every loop, and whose matrices tensor parallelism divides."""
    folder = place / "runs" / layout.replace("=", "-")
    done = workers(place, str(folder), layout)
    assert done.returncode == 0, done.stderr
    alone, together = (open_model(run, device="cpu").model for run in (trained, folder))
    for (name, one), (_, two) in zip(alone.named_parameters(), together.named_parameters(), strict=True):
        if exact:
            assert torch.equal(one, two), name
        else:
            torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_stages_of_a_pipeline_refuse(place):
    done = workers(place, "runs/stages", "parallel.pipeline=2", "model.layers=2")
    assert done.returncode == 2
    assert "use parallel.pipeline = 1" in done.stderr.replace("\n", " ")
