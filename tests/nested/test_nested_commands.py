"""A nested model as a user makes, looks at, cuts and uses one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import run_command

from resilin.models.huggingface import load_pretrained
from resilin.nested import Budget, budget, cost, extract
from resilin.nested.record import NestRecord
from resilin.run.open_model import open_model

SETTINGS = """
name = "nested"
[source]
paths = ["text"]
sequence_length = 32
tokenizer = { kind = "bytes" }
held_out = { by = "tail", fraction = 0.2 }
[model]
hidden_size = 32
layers = 3
heads = 4
mlp_size = 64
max_positions = 128
[objective]
use = "resilin.nested.objective:Nested"
[optimizer]
lr = 0.01
[train]
steps = 40
batch_size = 8
micro_batch_size = 4
threads = 1
device = "cpu"
[precision]
compute = "fp32"
[evaluation]
every = 20
batches = 2
[checkpoint]
every = 20
[log]
tensorboard = false
live = false
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("place")
    (folder / "text").mkdir()
    library = Path(json.__file__).parent.parent
    for name in ("textwrap.py", "string.py", "heapq.py"):
        (folder / "text" / f"{name}.txt").write_text((library / name).read_text())
    (folder / "run.toml").write_text(SETTINGS)
    return folder


@pytest.fixture(scope="module")
def resilin(place):
    return lambda *arguments: run_command(place, arguments)


@pytest.fixture(scope="module")
def trained(resilin, place) -> Path:
    done = resilin("train", "run.toml", "--folder", "runs/nested")
    assert done.returncode == 0, done.stderr
    return place / "runs" / "nested"


def events(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]


def logits(model, tokens):
    with torch.no_grad():
        return model.logits(model(tokens).hidden_BTD)


def test_a_run_logs_the_sizes_it_computes_and_evaluates_all(trained):
    told = events(trained)
    steps = [e for e in told if e["event"] == "step"]
    drawn = {name for e in steps for name in e["logs"] if name.startswith("loss_at_")}
    assert drawn == {f"loss_at_{one}" for one in ("0.125", "0.25", "0.5", "1")}
    assert all(sum(name.startswith("loss_at_") for name in e["logs"]) == 1 for e in steps)
    last = [e for e in told if "metrics" in e and e.get("name") == "validation"][-1]["metrics"]
    assert last["loss_at_1"] == pytest.approx(last["loss"])
    assert last["loss_at_0.125"] > 0


def test_resuming_gives_the_same_bits(resilin, trained, place):
    first = resilin("train", "run.toml", "train.steps=40", "--folder", "runs/again")
    assert first.returncode == 0, first.stderr
    one, two = (open_model(run, device="cpu").model for run in (trained, place / "runs" / "again"))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    import shutil

    shutil.rmtree(place / "runs" / "again" / "checkpoints" / "step-00000040")
    assert resilin("train", "run.toml", "--folder", "runs/again", "--resume").returncode == 0
    two = open_model(place / "runs" / "again", device="cpu").model
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))


def test_the_family_is_a_table_json_and_a_picture(resilin, trained, place):
    shown = resilin("family", str(trained), "--no-timed", "--budget", "ffn=5")
    assert shown.returncode == 0, shown.stderr
    assert all(word in shown.stdout for word in ("0.125", "trained", "mix", "untrained", "agreement"))
    assert "1 of these were not trained" in shown.stderr
    told = json.loads(resilin("family", str(trained), "--between", "2", "--plot", "f.png", "--json").stdout)
    members = told["members"]
    assert len(members) == 4 + 3 * 2
    assert [m["kind"] for m in members].count("trained") == 4
    assert [m["flops_per_token"] for m in members] == sorted(m["flops_per_token"] for m in members)
    assert members[-1]["agreement"] == 1.0
    assert members[-1]["kl"] == 0.0
    assert all(m["seconds_per_token"] > 0 for m in members)
    full = open_model(trained, device="cpu").model.settings
    assert members[0]["parameters"] == cost(full, Budget(ffn=8)).parameters
    assert (place / "f.png").read_bytes().startswith(b"\x89PNG")


def test_extracting_takes_the_budget_or_the_largest_that_fits(resilin, trained, place):
    model = open_model(trained, device="cpu").model
    tokens = torch.arange(20)[None]
    done = resilin("extract", str(trained), "small", "--budget", "ffn=16")
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    with budget(model, Budget(ffn=16)):
        torch.testing.assert_close(logits(load_pretrained(place / "small"), tokens), logits(model, tokens))
    limit = cost(model.settings, Budget(ffn=(16, 16, 32))).parameters
    done = resilin("extract", str(trained), "mixed", "--params", f"{limit / 1e3}k")
    assert "transformers does not" in done.stdout
    assert load_pretrained(place / "mixed").settings == extract(model, Budget(ffn=(16, 16, 32))).settings
    done = resilin("extract", str(trained), "slow", "--latency", "100s")
    assert load_pretrained(place / "slow").settings.feed_forward_size == 64
    done = resilin("extract", str(trained), "odd", "--budget", "ffn=5")
    assert "Nothing tells that the model was trained at this size" in done.stderr
    done = resilin("extract", "small", "smaller", "--budget", "ffn=8,skip=1")  # of a folder, by slices
    assert done.returncode == 0, done.stderr
    with budget(model, Budget(ffn=8, skip=(1,))):
        torch.testing.assert_close(logits(load_pretrained(place / "smaller"), tokens), logits(model, tokens))


def test_generating_with_a_part_is_what_the_extracted_model_writes(resilin, trained, place):
    resilin("extract", str(trained), "part", "--budget", "ffn=16")
    options = ("-p", "import ", "-n", "12", "--temperature", "0", "--json")
    one = json.loads(resilin("generate", str(trained), "--budget", "ffn=16", *options).stdout)
    assert one == json.loads(resilin("generate", "part", *options).stdout) | {"logprobs": one["logprobs"]}
    whole = resilin("generate", str(trained), *options[:-1])
    drafted = resilin("generate", str(trained), "--draft", "ffn=8", *options[:-1])
    assert drafted.stdout.rstrip() == whole.stdout.rstrip()
    assert "drafted tokens kept" in drafted.stderr


def test_nesting_a_trained_model_keeps_it_and_says_how_to_go_on(resilin, trained, place):
    done = resilin("nest", str(trained), "ordered", "--text", "text/heapq.py.txt", "--granularities", "0.25,0.5,1")
    assert done.returncode == 0, done.stderr
    assert "granularities = [0.25, 0.5, 1]" in done.stdout
    tokens = torch.arange(20)[None]
    model = open_model(trained, device="cpu").model
    torch.testing.assert_close(
        logits(load_pretrained(place / "ordered"), tokens), logits(model, tokens), rtol=1e-4, atol=1e-4
    )
    record = NestRecord.read(place / "ordered")
    assert record == NestRecord((0.25, 0.5, 1), ("ffn",), ordering="activation")
    assert record.kind(model.settings, Budget(ffn=16)) == "untrained"
    text = SETTINGS.replace("hidden_size = 32\nlayers = 3\nheads = 4\nmlp_size = 64\nmax_positions = 128\n", "")
    text = text.replace("[model]", '[model]\nuse = "resilin.models.pretrained:Pretrained"\npath = "ordered"')
    (place / "on.toml").write_text(text.replace('tokenizer = { kind = "bytes" }', 'tokenizer = { path = "ordered" }'))
    done = resilin("train", "on.toml", "train.steps=4", "--folder", "runs/on")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("extract", "RUN", "x"), "say which member"),
        (("extract", "RUN", "x", "--params", "20X"), "is no number"),
        (("extract", "RUN", "x", "--latency", "20"), "is no time"),
        (("extract", "RUN", "x", "--budget", "ffn=65"), "the layer has 64"),
        (("extract", "plain", "x", "--params", "1M"), "nothing tells at which sizes"),
        (("family", "plain"), "nothing tells at which sizes"),
        (("family", "plain", "--granularities", "0.5,x"), "'x' is no number"),
        (("family", "plain", "--granularities", "0.5"), "the last one should be 1"),
        (("family", "plain", "--granularities", "0.3,1"), "no whole number"),
        (("family", "plain", "--granularities", "0.5,1", "--targets", "f"), "expected ffn, heads"),
        (("family", "plain", "--granularities", "0.5,1", "--plot", "p.png"), "give --text"),
        (("generate", "RUN", "-p", "a", "--budget", "ffn=0"), "leave a layer empty"),
        (("generate", "RUN", "-p", "a", "--draft", "ffn=8", "--json"), "--draft writes plain answers"),
        (("train", "run.toml", "objective.granularities=[0.3,1]", "--folder", "runs/bad"), "no whole number"),
        (("train", "run.toml", "objective.mode=joint", "--folder", "runs/bad"), "mode"),
    ],
)
def test_what_cannot_be_done_is_told(resilin, trained, place, arguments, says):
    if not (place / "plain").exists():
        assert resilin("export", str(trained), "plain").returncode == 0
    done = resilin(*(str(trained) if one == "RUN" else one for one in arguments))
    assert done.returncode == 2, done.stdout
    assert says in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("layout", "exact"),
    [
        ("parallel.data=2", True),
        pytest.param("parallel.pipeline=2", True, marks=pytest.mark.slow),
        pytest.param("parallel.tensor=2", False, marks=pytest.mark.slow),
        pytest.param("parallel.sharding=fsdp", False, marks=pytest.mark.slow),
    ],
)
def test_workers_train_the_same_nested_model(trained, place, layout, exact):
    """Real processes; the run's micro-batches are the same, and with them the sums."""
    folder = place / "runs" / layout.replace("=", "-")
    command = [sys.executable, "-m", "resilin", "train", "run.toml", "--folder", str(folder), "--workers", "2", layout]
    done = subprocess.run(command, cwd=place, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    alone, together = (open_model(run, device="cpu").model for run in (trained, folder))
    for (name, one), (_, two) in zip(alone.named_parameters(), together.named_parameters(), strict=True):
        if exact:
            assert torch.equal(one, two), name
        else:
            torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_heads_that_ranks_divide_are_cut_as_one_process_cuts_them(resilin, place):
    """One of two ranks has no head of the smaller size."""
    heads = ('objective.targets=["ffn", "heads"]', "objective.granularities=[0.5, 1]")
    folders = [place / "runs" / name for name in ("heads", "heads-tensor")]
    for folder, layout in zip(folders, ((), ("--workers", "2", "parallel.tensor=2")), strict=True):
        done = resilin("train", "run.toml", "--folder", str(folder), *layout, *heads)
        assert done.returncode == 0, done.stderr
    alone, together = (open_model(run, device="cpu").model for run in folders)
    for one, two in zip(alone.parameters(), together.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-4)
