"""A mixture of experts that was trained elastically, as a user looks at it and cuts it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from commands import run_command

from resilin.models.huggingface import load_pretrained
from resilin.nested import Budget, budget
from resilin.run.open_model import open_model

SETTINGS = """
name = "elastic"
[source]
paths = ["text.py"]
sequence_length = 32
tokenizer = { kind = "bytes" }
held_out = { by = "tail", fraction = 0.2 }
[model]
hidden_size = 16
layers = 4
heads = 2
max_positions = 64
moe = { experts = 6, experts_per_token = 4, expert_size = 8 }
[objective]
use = "resilin.nested.elastic_pretraining:ElasticPretraining"
evaluated = ["top_k=1", "experts=3,skip=1"]
[optimizer]
lr = 0.01
[train]
steps = 6
batch_size = 8
threads = 1
device = "cpu"
[precision]
compute = "fp32"
[evaluation]
every = 6
batches = 2
[log]
tensorboard = false
live = false
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("elastic")
    (folder / "text.py").write_text(Path(json.__file__).read_text() * 2)
    (folder / "prose.txt").write_text("It was the best of times, it was the worst of times. " * 40)
    (folder / "run.toml").write_text(SETTINGS)
    done = run_command(folder, ("train", "run.toml", "--folder", "runs/elastic"))
    assert done.returncode == 0, done.stderr
    return folder


def test_held_out_losses_are_logged(place):
    lines = [json.loads(line) for line in (place / "runs/elastic/events.jsonl").read_text().splitlines()]
    last = [line for line in lines if line["event"] == "eval"][-1]["metrics"]
    assert {"loss", "loss_at_top_k=1", "loss_at_experts=3,skip=1"} <= set(last)
    steps = [line["logs"] for line in lines if line["event"] == "step"]
    assert all({"layers", "experts", "top_k"} <= set(logs) for logs in steps)


def test_the_family_has_what_was_trained(place):
    done = run_command(place, ("family", "runs/elastic", "--json", "--no-timed", "--budget", "ffn=4"))
    assert done.returncode == 0, done.stderr
    members = {one["name"]: one for one in json.loads(done.stdout)["members"]}
    assert members["full"]["kind"] == members["top_k 1"]["kind"] == members["experts 3"]["kind"] == "trained"
    assert members["ffn 4"]["kind"] == "untrained"
    assert members["experts 3, top_k 1"]["parameters"] < members["top_k 1"]["parameters"]


def test_the_most_used_experts_and_the_best_layers_are_cut_out(place):
    done = run_command(place, ("extract", "runs/elastic", "small", "--layers", "3", "--experts", "3", "--top-k", "2"))
    assert done.returncode == 0, done.stderr
    assert "Nothing tells" not in done.stderr
    small = load_pretrained(place / "small")
    told = small.settings
    assert (told.layers, told.moe.experts, told.moe.experts_per_token) == (3, 3, 2)
    assert json.loads((place / "small/config.json").read_text())["model_type"] == "mixtral"
    tokens = torch.arange(20)[None] + 60
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(place / "small", dtype=torch.float32).eval()
    with torch.no_grad():
        expected = theirs(tokens).logits
        torch.testing.assert_close(small.logits(small(tokens).hidden_BTD), expected, rtol=1e-4, atol=1e-5)


def test_a_budget_and_sizes_at_once_are_refused(place):
    done = run_command(place, ("extract", "runs/elastic", "x", "--experts", "3", "--budget", "top_k=1"))
    assert done.returncode != 0
    assert "say which member" in done.stderr


def test_how_experts_are_used_is_told(place):
    pytest.importorskip("matplotlib")
    texts = ("--text", "python=text.py", "--text", "prose=prose.txt")
    done = run_command(place, ("experts", "load", "runs/elastic", *texts, "--json", "--plot", "loads.png"))
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert set(told["texts"]) == {"python", "prose"}
    for one in told["texts"].values():
        assert len(one["entropy"]) == 4
        assert all(0 <= value <= 1 for value in one["entropy"])
        assert all(sum(row) == pytest.approx(1) for row in one["share"])
    assert len(told["overlap"]["python, prose"]) == 4
    assert (place / "loads.png").read_bytes()[:4] == b"\x89PNG"
    wrong = run_command(place, ("experts", "load", "runs/elastic", "--text", "prose.txt"))
    assert "NAME=FILE" in wrong.stderr


def test_the_command_runs_the_same_sub_model_in_place(place):
    model = open_model(place / "runs/elastic", device="cpu").model
    with budget(model, Budget(experts=3, top_k=1)):
        assert len(model(torch.arange(8)[None]).router_logits) == 4
