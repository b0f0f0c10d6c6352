"""Sources whose optimizer has no parameter groups, or that have no optimizer: nothing is guessed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from resilin.checkpoint.errors import CheckpointError
from resilin.checkpoint.folder import CheckpointFolder
from resilin.checkpoint.foreign.convert import Options, convert, open_stored
from resilin.checkpoint.foreign.deepspeed_write import Zero
from resilin.checkpoint.foreign.formats import WriteOptions
from resilin.checkpoint.foreign.groups import load_groups
from resilin.checkpoint.tensor_write import host_bytes

RUN = """
[source]
paths = ["text"]
sequence_length = 32
[source.tokenizer]
kind = "bytes"
[source.held_out]
by = "tail"
[model]
hidden_size = 32
layers = 1
heads = 2
tie_embeddings = true
[optimizer]
lr = 0.01
weight_decay = 0.2
[train]
steps = 3
batch_size = 4
threads = 1
[precision]
compute = "fp32"
[log]
tensorboard = false
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run that Resilin's own command trained with AdamW."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "text").mkdir()
    (folder / "text" / "some.txt").write_text(Path(__file__).read_text(encoding="utf-8") * 3, encoding="utf-8")
    (folder / "run.toml").write_text(RUN, encoding="utf-8")
    code = "from resilin.cli.main import main; main()"
    command = [sys.executable, "-c", code, "train", "run.toml", "--folder", "run"]
    done = subprocess.run(
        command, cwd=folder, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return folder / "run"


def test_deepspeed_goes_on_with_a_run_of_resilin(run, run_on_ranks, tmp_path):
    pytest.importorskip("deepspeed")
    for stage in (2, 3):
        options = Options(target_format="deepspeed", write=WriteOptions(zero=Zero(stage, 2)))
        convert(run, tmp_path / f"zero-{stage}", options)
    convert(run, tmp_path / "universal", Options(target_format="universal"))
    zero = [f"zero:{stage}={tmp_path / f'zero-{stage}'}" for stage in (2, 3)]
    run_on_ranks("deepspeed_open_run.py", run, *zero, f"universal:1={tmp_path / 'universal'}")


def test_a_run_says_how_its_parameters_are_trained(run):
    stored = open_stored(run)
    assert [group["weight_decay"] for group in stored.groups] == pytest.approx([0.2, 0.0])
    for group in stored.groups:
        assert (group["lr"], group["betas"], group["eps"]) == (0.01, [0.9, 0.95], 1e-8)
        assert all((stored.tensor(f"model/{n}").dim() > 1) == (group["weight_decay"] > 0) for n in group["parameters"])
    assert {n for group in stored.groups for n in group["parameters"]} == {
        name.removeprefix("optimizer/step/") for name in stored.under("optimizer/step/")
    }


@pytest.fixture
def ungrouped(tmp_path) -> Path:
    moments = {
        name: {"exp_avg": torch.ones(shape), "step": torch.tensor(4.0)} for name, shape in (("a", (5, 3)), ("b", (7,)))
    }
    state = {"model": {"b": torch.ones(7), "a": torch.ones(5, 3)}, "optimizer": {"parameters": moments}}
    CheckpointFolder(tmp_path / "ungrouped").save(4, state)
    return tmp_path / "ungrouped"


@pytest.mark.parametrize("target", ["universal", "deepspeed"])
def test_states_without_groups_are_grouped_as_the_user_says(ungrouped, tmp_path, canonical_bytes, target):
    with pytest.raises(CheckpointError, match="has no parameter groups; say with --groups FILE how"):
        convert(ungrouped, tmp_path / "out", Options(target_format=target))
    (tmp_path / "groups.toml").write_text('[[group]]\nparameters = ["*"]\nlr = 0.5\nbetas = [0.9, 0.99]\n')
    groups = load_groups(tmp_path / "groups.toml")
    convert(ungrouped, tmp_path / "out", Options(target_format=target, groups=groups))
    again = open_stored(tmp_path / "out")
    assert again.groups == [{"lr": 0.5, "betas": [0.9, 0.99], "parameters": ["b", "a"]}]  # in the model's order
    assert canonical_bytes(again) == canonical_bytes(ungrouped)


def test_the_first_group_that_matches_takes_a_parameter(ungrouped, tmp_path):
    groups = [{"parameters": ["a"], "lr": 1.0}, {"parameters": ["*"], "lr": 2.0}]
    convert(ungrouped, tmp_path / "out", Options(target_format="universal", groups=groups))
    assert open_stored(tmp_path / "out").groups == [{"lr": 1.0, "parameters": ["a"]}, {"lr": 2.0, "parameters": ["b"]}]


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ([{"parameters": ["a"], "lr": 1.0}], "no group of --groups has 'b', which the optimizer keeps states of"),
        ([{"parameters": ["*", "gone"], "lr": 1.0}], "'gone' matches no parameter"),
        (
            [{"parameters": ["*"], "lr": 1.0}, {"parameters": ["b"], "lr": 1.0}],
            "group 1 matches no parameter that is not",
        ),
    ],
)
def test_groups_that_do_not_fit_are_refused(ungrouped, tmp_path, groups, message):
    with pytest.raises(CheckpointError, match=message):
        convert(ungrouped, tmp_path / "out", Options(target_format="universal", groups=groups))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[group]\nlr = 1.0", "should hold a list `group` alone"),
        ("[[group]]\nlr = 1.0", "group 0 should have `parameters`"),
        ('[[group]]\nparameters = ["*"]', "group 0 should have `lr`"),
        ("[[group", "cannot be read as groups"),
    ],
)
def test_a_file_that_holds_no_groups_is_refused(tmp_path, text, message):
    (tmp_path / "groups.toml").write_text(text)
    with pytest.raises(CheckpointError, match=message):
        load_groups(tmp_path / "groups.toml")


@pytest.mark.parametrize("target", ["universal", "deepspeed"])
def test_weights_alone_begin_a_new_optimizer_only_if_it_is_said(tmp_path, target):
    source = tmp_path / "model"
    source.mkdir()
    weights = {"a": torch.randn(5, 3).bfloat16(), "b": torch.randn(7).bfloat16(), "mask": torch.arange(4)}
    save_file(weights, source / "model.safetensors")
    groups = [{"parameters": ["a", "b"], "lr": 0.5}]
    for options, message in (
        ({}, "has no parameter groups; write another format for weights alone, or begin"),
        ({"groups": groups}, "has no optimizer states to be grouped; --zero-states begins"),
        ({"zero_states": True}, "--zero-states: which parameters are trained, and how, is said with --groups FILE"),
        (
            {"groups": [{"parameters": ["*"], "lr": 1.0}], "zero_states": True},
            "'model/mask' is I64, which no optimizer",
        ),
    ):
        with pytest.raises(CheckpointError, match=message):
            convert(source, tmp_path / "out", Options(target_format=target, **options))
    convert(source, tmp_path / "out", Options(target_format=target, groups=groups, zero_states=True))
    again = open_stored(tmp_path / "out")
    assert again.step == 0
    for name in ("a", "b"):
        assert torch.equal(again.tensor(f"model/{name}"), weights[name].float())
        for state in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(again.tensor(f"optimizer/{state}/{name}"), torch.zeros(weights[name].shape))
        assert float(again.tensor(f"optimizer/step/{name}")) == 0
    assert torch.equal(again.tensor("model/mask"), weights["mask"].to(again.tensor("model/mask").dtype))


def test_zeros_do_not_take_the_place_of_states(ungrouped, tmp_path):
    groups = [{"parameters": ["*"], "lr": 0.5}]
    with pytest.raises(CheckpointError, match="has optimizer states: --zero-states would take their place"):
        convert(ungrouped, tmp_path / "out", Options(target_format="universal", groups=groups, zero_states=True))


def test_the_command_takes_groups(ungrouped, tmp_path):
    from typer.testing import CliRunner

    from resilin.cli.main import app

    (tmp_path / "groups.json").write_text('{"group": [{"parameters": ["*"], "lr": 0.5}]}')
    command = ["checkpoint", "convert", str(ungrouped), str(tmp_path / "out"), "--to", "universal"]
    result = CliRunner().invoke(app, [*command, "--groups", str(tmp_path / "groups.json")])
    assert result.exit_code == 0, result.output
    assert bytes(host_bytes(open_stored(tmp_path / "out").tensor("model/a"))) == bytes(host_bytes(torch.ones(5, 3)))
    assert open_stored(tmp_path / "out").groups == [{"lr": 0.5, "parameters": ["b", "a"]}]
