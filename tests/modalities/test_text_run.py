"""A run with tokens further on, as a user trains and uses it."""

from __future__ import annotations

import json
from pathlib import Path

from commands import run_command

SETTINGS = """
name = "further"
[source]
paths = ["text"]
sequence_length = 32
tokenizer = { kind = "bytes" }
held_out = { by = "tail", fraction = 0.2 }
[model]
use = "resilin.modalities.model:GroupDecoderSettings"
mtp = { depth = 1 }
decoder = { hidden_size = 32, layers = 1, heads = 4, mlp_size = 64, max_positions = 128 }
[objective]
use = "resilin.modalities.objective:NextGroup"
balance = {}
[optimizer]
lr = 0.01
[train]
steps = 8
batch_size = 8
micro_batch_size = 4
threads = 1
device = "cpu"
[evaluation]
every = 8
batches = 2
[checkpoint]
every = 4
[log]
tensorboard = false
live = false
"""


def test_train_generate_and_export(tmp_path: Path) -> None:
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text("the cat sat on the mat and the dog sat on the log. " * 60)
    (tmp_path / "further.toml").write_text(SETTINGS)
    done = run_command(tmp_path, ("train", "further.toml"))
    assert done.returncode == 0, done.stderr
    events = [json.loads(line) for line in (tmp_path / "runs/further/events.jsonl").read_text().splitlines()]
    steps = [event for event in events if "lr" in event]
    assert {"text", "mtp_1", "weight_text"} <= set(steps[-1]["logs"])
    assert steps[-1]["logs"]["text"] < steps[0]["logs"]["text"]
    wrote = run_command(tmp_path, ("generate", "runs/further", "--prompt", "the cat", "--max-new-tokens", "4"))
    assert wrote.returncode == 0, wrote.stderr
    how = ("--prompt", "the cat", "--max-new-tokens", "12", "--temperature", "0")
    plain = run_command(tmp_path, ("generate", "runs/further", *how))
    drafted = run_command(tmp_path, ("generate", "runs/further", *how, "--draft", "mtp"))
    assert drafted.returncode == 0, drafted.stderr
    assert drafted.stdout == plain.stdout
    assert "drafted tokens kept" in drafted.stderr
    exported = run_command(tmp_path, ("export", "runs/further", "plain"))
    assert exported.returncode == 0, exported.stderr
    config = json.loads((tmp_path / "plain/config.json").read_text())
    assert config["model_type"] == "llama"
    assert config["num_hidden_layers"] == 1
    refused = run_command(tmp_path, ("generate", "plain", *how, "--draft", "mtp"))
    assert refused.returncode != 0
    assert "which exports leave out" in refused.stderr.replace("\n", " ")
