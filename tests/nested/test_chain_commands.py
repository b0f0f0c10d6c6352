"""Decoders of chains as a user trains, looks at, cuts, grows and divides one."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from commands import run_command

from resilin.models.huggingface import load_pretrained
from resilin.nested import Budget, budget
from resilin.run.open_model import open_model

SETTINGS = """
name = "chains"
[source]
paths = ["text"]
sequence_length = 32
tokenizer = { kind = "bytes" }
held_out = { by = "tail", fraction = 0.2 }
[model]
hidden_size = 32
layers = 2
heads = 4
mlp_size = 64
max_positions = 64
chains = { sizes = [1, 1, 2] }
[objective]
use = "resilin.nested.chain_objective:ChainLosses"
[optimizer]
lr = 0.01
[train]
steps = 6
batch_size = 4
micro_batch_size = 2
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


def logits(model, tokens):
    with torch.no_grad():
        return model.logits(model(tokens).hidden_BTD)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("place")
    (folder / "text").mkdir()
    (folder / "text" / "a.txt").write_text(Path(json.__file__).read_text())
    (folder / "chains.toml").write_text(SETTINGS)
    done = run_command(folder, ("train", "chains.toml"))
    assert done.returncode == 0, done.stderr
    return folder


def test_a_run_is_looked_at_and_cut_by_its_scales(place):
    listed = run_command(place, ("family", "runs/chains", "--no-timed"))
    assert listed.returncode == 0, listed.stderr
    assert all(name in listed.stdout for name in ("1 chain", "2 chains", "3 chains"))
    cut = run_command(place, ("extract", "runs/chains", "small", "--budget", "chains=1"))
    assert cut.returncode == 0, cut.stderr
    assert json.loads((place / "small" / "config.json").read_text())["model_type"] == "llama"
    two = run_command(place, ("extract", "runs/chains", "two", "--budget", "chains=2"))
    assert "layers have chains" in two.stdout
    assert load_pretrained(place / "two").settings.chains.sizes == (1, 1)


def test_a_run_is_expanded_by_a_command_and_trained_on(place):
    done = run_command(place, ("chains", "expand", "runs/chains", "wider", "--heads", "2"))
    assert done.returncode == 0, done.stderr
    assert "resilin.models.pretrained:Pretrained" in done.stdout
    wide, text = load_pretrained(place / "wider"), torch.tensor([list(b"def f(x)")])
    assert wide.settings.chains.sizes == (1, 1, 2, 2)
    told = SETTINGS[SETTINGS.index("[source]") : SETTINGS.index("[model]")]
    rest = SETTINGS[SETTINGS.index("[optimizer]") :]
    model = '[model]\nuse = "resilin.models.pretrained:Pretrained"\npath = "wider"\n'
    objective = '[objective]\nuse = "resilin.nested.chain_objective:ChainLosses"\nloss = "last"\n'
    (place / "on.toml").write_text(
        f'name = "on"\n{told}{model}{objective}{rest}'.replace("sequence_length = 32", "sequence_length = 16")
    )
    trained = run_command(place, ("train", "on.toml"))
    assert trained.returncode == 0, trained.stderr
    cut = run_command(place, ("extract", "runs/on", "back", "--budget", "chains=3", "--force"))
    assert cut.returncode == 0, cut.stderr
    with budget(wide, Budget(chains=3)):
        expected = logits(wide, text)
    assert torch.equal(logits(load_pretrained(place / "back"), text), expected)
    refused = run_command(place, ("chains", "expand", "runs/chains", "other", "--heads", "1", "--share-keys"))
    assert refused.returncode != 0
    assert "a further chain cannot change" in refused.stderr
    shutil.rmtree(place / "back")


# -- workers ----------------------------------------------------------------------------------------------------------


def workers(place: Path, *layout: str) -> subprocess.CompletedProcess[str]:
    folder = f"runs/{'-'.join(layout).replace('=', '-')}"
    command = [sys.executable, "-m", "resilin", "train", "chains.toml", "--folder", folder, "--workers", "2", *layout]
    return subprocess.run(command, cwd=place, capture_output=True, text=True, timeout=200, check=False)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layout", "exact"),
    [
        ("parallel.data=2", True),
        ("parallel.pipeline=2", True),
        ("parallel.sharding=zero1", True),
        ("parallel.sharding=fsdp", False),
        ("parallel.context=2", False),
    ],
)
def test_workers_train_the_same_model_of_chains(place, layout, exact):
    """Real processes: all scales are trained, in a pipeline too, whose last stage reads them off its states."""
    done = workers(place, layout)
    assert done.returncode == 0, done.stderr
    folder = place / "runs" / layout.replace("=", "-")
    alone, together = (open_model(run, device="cpu").model for run in (place / "runs" / "chains", folder))
    for (name, one), (_, two) in zip(alone.named_parameters(), together.named_parameters(), strict=True):
        if exact:
            assert torch.equal(one, two), name
        else:
            torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layout", "says"),
    [
        (("parallel.tensor=2",), "chains (model.chains) cannot be divided among ranks of tensor parallelism"),
        (("parallel.pipeline=2", "model.tie_embeddings=true"), "the two ends of a pipeline share one"),
    ],
)
def test_what_chains_cannot_be_divided_by_is_refused(place, layout, says):
    done = workers(place, *layout)
    assert done.returncode == 2, done.stderr
    assert says in " ".join(done.stderr.split())
