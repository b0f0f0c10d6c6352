"""Nemotron Elastic through commands: a parent is trained, made elastic, and cut."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from commands import run_command

from resilin.nested import Budget, BudgetError, extract
from resilin.nested.chosen_record import ChosenRecord
from resilin.run.open_model import open_model

PARENT = """
name = "parent"
train = { steps = 4, batch_size = 4, device = "cpu", threads = 1 }
log.tensorboard = false
[source]
use = "resilin.data.text_source:TextSource"
paths = ["text.txt"]
sequence_length = 16
tokenizer.kind = "bytes"
held_out.by = "tail"
[model]
use = "resilin.models.hybrid_settings:HybridSettings"
hidden_size = 16
pattern = "M-*-"
heads = 4
kv_heads = 2
mlp_size = 32
max_positions = 64
mamba = { heads = 4, head_size = 8, groups = 2, state_size = 8, chunk = 8 }
"""
ELASTIC = """
name = "elastic"
train = { steps = 8, batch_size = 4, device = "cpu", threads = 1 }
optimizer.rules = [{ match = "router.*", lr_scale = 100.0, weight_decay = 0.0 }]
log.tensorboard = false
checkpoint.every = 4
evaluation.every = 8
[source]
use = "resilin.data.lengths:Lengths"
phases = [{ steps = 4, sequence_length = 8 }, { sequence_length = 16 }]
[source.source]
use = "resilin.data.text_source:TextSource"
paths = ["text.txt"]
tokenizer.kind = "bytes"
held_out.by = "tail"
[objective]
use = "resilin.nested.elastic:NemotronElastic"
router_until = 0.75
phases = [{ until = 0.5 }, { weights = [0.2, 0.3, 0.5] }]
[model]
use = "resilin.nested.elastic_model:Elastic"
targets = [0.6, 0.8, 1]
calibration_batches = 2
router_size = 16
space = { ffn = [0.5, 1], heads = [0.5, 1], mamba = [0.5, 1], hidden = [0.75, 1], depth = [0.75, 1] }
[model.model]
use = "resilin.models.pretrained:Pretrained"
path = "folder"
[model.calibration]
use = "resilin.data.text_source:TextSource"
paths = ["text.txt"]
sequence_length = 16
tokenizer.kind = "bytes"
held_out.by = "tail"
"""


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    path = tmp_path_factory.mktemp("elastic")
    (path / "text.txt").write_text("".join(f"the cat {n} sat on the mat. " for n in range(200)))
    (path / "parent.toml").write_text(PARENT)
    (path / "elastic.toml").write_text(ELASTIC)
    for arguments in (("train", "parent.toml"), ("export", "runs/parent", "folder"), ("train", "elastic.toml")):
        done = run_command(path, arguments)
        assert done.returncode == 0, done.stderr
    return path


@pytest.fixture(autouse=True)
def inside(workplace, monkeypatch):
    monkeypatch.chdir(workplace)  # settings name the parent's folder


def test_each_target_is_taken_out_of_the_one_checkpoint(workplace):
    told = json.loads((workplace / "runs/elastic/elastic.json").read_text())
    assert set(told["targets"]) == {"0.6", "0.8", "1"}
    wanted = "runs/elastic/budget-0.6.json"
    done = run_command(workplace, ("extract", "runs/elastic", "small", "--budget", wanted))
    assert done.returncode == 0, done.stderr
    small, whole = open_model(workplace / "small").model, open_model(workplace / "runs/elastic").model
    again = extract(whole, Budget.read(workplace / wanted))
    tokens = torch.arange(12)[None]
    assert torch.equal(small(tokens).hidden_BTD, again(tokens).hidden_BTD)
    assert sum(p.numel() for p in small.parameters()) == told["targets"]["0.6"]["parameters"]
    done = run_command(workplace, ("generate", "small", "--prompt", "the", "--max-new-tokens", "3"))
    assert done.returncode == 0, done.stderr


def test_the_chosen_sizes_are_the_family(workplace):
    told = json.loads((workplace / "runs/elastic/elastic.json").read_text())["targets"]
    done = run_command(workplace, ("family", "runs/elastic", "--json", "--no-timed"))
    assert done.returncode == 0, done.stderr
    members = json.loads(done.stdout)["members"]
    assert sorted(one["name"] for one in members) == ["0.6", "0.8", "1"]
    assert {one["kind"] for one in members} == {"trained"}
    assert all(one["parameters"] == told[one["name"]]["parameters"] for one in members)
    most = told["0.8"]["parameters"]
    done = run_command(workplace, ("extract", "runs/elastic", "by-size", "--params", str(most)))
    assert done.returncode == 0, done.stderr
    assert f"{most:,} of" in done.stdout


def test_sizes_that_nobody_wrote_are_refused(tmp_path):
    assert ChosenRecord.read(tmp_path) is None
    (tmp_path / "elastic.json").write_text('{"targets": {"0.5": {}}}')
    with pytest.raises(BudgetError, match=r"elastic\.json: expected sizes of each target"):
        ChosenRecord.read(tmp_path)


def test_every_target_is_evaluated(workplace):
    lines = [json.loads(line) for line in (workplace / "runs/elastic/events.jsonl").read_text().splitlines()]
    found = [line["metrics"] for line in lines if line["event"] == "eval"]
    assert {"loss", "loss_at_0.6", "kl_at_0.6", "cost_at_0.6", "loss_at_1"} <= set(found[-1])


def test_a_resumed_run_ends_with_the_same_bits(workplace):
    done = run_command(workplace, ("train", "elastic.toml", "name=again"))
    assert done.returncode == 0, done.stderr
    checkpoints = workplace / "runs/again/checkpoints"
    shutil.rmtree(checkpoints / "step-00000008")
    (checkpoints / "latest").unlink(missing_ok=True)
    done = run_command(workplace, ("train", "elastic.toml", "name=again", "--resume"))
    assert done.returncode == 0, done.stderr
    assert (checkpoints / "step-00000008").is_dir()
    mine, other = (open_model(workplace / f"runs/{name}").model for name in ("again", "elastic"))
    for one, two in zip(mine.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two)
