"""Experts as their owners make, hand over, join and take them out, by command."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import pytest
import torch
from commands import run_command

from resilin.joined import Expert, JoinedRecord
from resilin.models.huggingface import load_pretrained
from resilin.models.weight_files import read_json
from resilin.run.open_model import open_model

COMMON = """
[optimizer]
lr = 0.01
weight_decay = 0.1
[train]
steps = 12
batch_size = 4
threads = 1
device = "cpu"
[precision]
compute = "fp32"
[evaluation]
every = 0
[checkpoint]
every = 6
[log]
tensorboard = false
live = false
"""
SOURCE = """
[source]
paths = ["{path}"]
sequence_length = 24
tokenizer = {{ kind = "bytes" }}
held_out = {{ by = "tail", fraction = 0.2 }}
"""
PUBLIC = """
[model]
hidden_size = 16
layers = 2
heads = 2
mlp_size = 24
max_positions = 64
"""
EXPERT = """
[model]
use = "resilin.joined.training:NewExpert"
path = "anchor"
seed = "{name}-seed"
[objective]
load_balance = 0.0
"""
TUNE = """
[model]
use = "resilin.joined.training:TunedRouter"
path = "joined"
[objective]
load_balance = 0.0
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("owners")
    library = Path(json.__file__).parent.parent
    for name, files in {"public": ("textwrap", "heapq"), "news": ("string",), "code": ("bisect", "stat")}.items():
        (folder / name).mkdir()
        for file in files:
            (folder / name / f"{file}.txt").write_text((library / f"{file}.py").read_text())
    (folder / "public.toml").write_text('name = "public"' + SOURCE.format(path="public") + PUBLIC + COMMON)
    for name in ("news", "code"):
        text = f'name = "{name}"' + SOURCE.format(path=name) + EXPERT.format(name=name) + COMMON
        (folder / f"{name}.toml").write_text(text)
    (folder / "tune.toml").write_text('name = "tune"' + SOURCE.format(path="public") + TUNE + COMMON)
    return folder


@pytest.fixture(scope="module")
def resilin(place):
    def run(*arguments: str):
        done = run_command(place, arguments)
        assert done.returncode == 0, done.stderr + done.stdout
        return done

    return run


@pytest.fixture(scope="module")
def joined(resilin, place) -> Path:
    resilin("train", "public.toml")
    resilin("experts", "anchor", "runs/public", "anchor", "--text", "public", "--rows", "stream")
    for name in ("news", "code"):
        told = resilin("experts", "seed", "anchor", f"{name}-seed", "--name", name, "--text", name)
        assert "resilin.joined.training:NewExpert" in told.stdout
        resilin("train", f"{name}.toml")
        resilin("experts", "pack", f"runs/{name}", f"{name}-expert", "--about", f"the files of {name}")
    resilin("experts", "join", "anchor", "news-expert", "code-expert", "-o", "joined", "--top-k", "2")
    return place / "joined"


def test_each_owner_trains_its_expert_only(joined, place):
    with contextlib.chdir(place):  # settings name the anchor as it was given
        public, news = (open_model(Path("runs") / name, device="cpu").model for name in ("public", "news"))
    assert torch.equal(public.embed.weight, news.embed.weight)
    assert torch.equal(public.blocks[1].mlp.up.weight, news.blocks[1].moe.experts.up[0])
    assert not torch.equal(news.blocks[1].moe.experts.up[0], news.blocks[1].moe.experts.up[1])
    both = load_pretrained(joined)
    assert torch.equal(both.blocks[1].moe.experts.up[1], news.blocks[1].moe.experts.up[1])
    assert torch.equal(both.blocks[0].moe.router.weight[:2], news.blocks[0].moe.router.weight)
    assert torch.equal(both.blocks[0].moe.router.bias[:2], news.blocks[0].moe.router.bias)


def test_a_resumed_expert_has_the_same_bits(joined, resilin, place):
    import shutil

    shutil.copytree(place / "runs" / "news", place / "runs" / "again")
    shutil.rmtree(place / "runs" / "again" / "checkpoints" / "step-00000012")
    resilin("train", "news.toml", "--folder", "runs/again", "--resume")
    resilin("experts", "pack", "runs/again", "again-expert")
    assert Expert.read(place / "again-expert").digest == Expert.read(place / "news-expert").digest


def test_an_expert_to_hand_over_holds_nothing_of_the_anchor(joined, place):
    expert = Expert.read(place / "news-expert")
    assert expert.card["about"] == "the files of news"
    assert expert.card["steps"] == 12
    assert {name.split(".")[2] for name in expert.tensors} == {"gate", "up", "down", "row", "offset"}
    raw = (place / "news-expert" / "expert.safetensors").read_bytes()
    for _, tensor in load_pretrained(place / "anchor").named_parameters():
        if tensor.unique().numel() > 1:  # norms that are still ones say nothing
            assert tensor.detach().numpy().tobytes() not in raw


def test_what_was_joined_is_shown_and_verified(joined, resilin):
    told = json.loads(resilin("experts", "show", "joined", "--json", "--text", "news/string.txt").stdout)
    assert [one["name"] for one in told["experts"]] == ["public", "news", "code"]
    assert told["top_k"] == 2
    assert sum(one["share"] for one in told["experts"]) == pytest.approx(1)
    assert "by layer" in resilin("experts", "show", "joined", "--text", "news/string.txt").stdout
    assert resilin("experts", "verify", "joined", "news-expert").stdout.count("ok ") == 4


def test_damage_is_found(joined, resilin, place):
    import shutil

    from safetensors.torch import load_file, save_file

    shutil.copytree(joined, place / "broken")
    tensors = load_file(place / "broken" / "model.safetensors")
    tensors["model.layers.0.mlp.experts.2.up_proj.weight"][0, 0] += 1
    save_file(tensors, place / "broken" / "model.safetensors")
    done = run_command(place, ("experts", "verify", "broken"))
    assert done.returncode == 1
    assert [line.split(":")[0] for line in done.stdout.splitlines()] == [
        "ok  anchor",
        "ok  public",
        "ok  news",
        "BAD code",
    ]


def test_one_answer_without_an_expert_is_a_budget(joined, resilin, place):
    model = load_pretrained(joined)
    wanted = JoinedRecord.read(joined).budget(model.settings, ["news"])
    (place / "request.json").write_text(json.dumps(wanted.to_dict()))
    resilin("experts", "without", "joined", "news", "-o", "less")
    asked = ("-p", "def", "--max-new-tokens", "12", "--temperature", "0")
    in_place = resilin("generate", "joined", "--budget", "request.json", *asked).stdout
    assert in_place == resilin("generate", "less", *asked).stdout
    assert read_json(place / "less" / "config.json")["settings"]["moe"]["experts"] == 2


def test_a_tuned_router_is_kept_apart_from_the_joined_one(joined, resilin, place):
    resilin("train", "tune.toml")
    resilin("experts", "retuned", "runs/tune", "-o", "tuned", "--tuned-on", "public text")
    before, tuned = load_pretrained(joined), load_pretrained(place / "tuned")
    different = {
        n for (n, p), q in zip(before.named_parameters(), tuned.parameters(), strict=True) if not torch.equal(p, q)
    }
    assert different == {f"blocks.{layer}.moe.router.weight" for layer in range(2)}
    record = JoinedRecord.read(place / "tuned")
    assert record.router == "tuned"
    assert record.experts[1].card["router_tuned_on"] == "public text"
    resilin("experts", "verify", "tuned", "news-expert")
    resilin("experts", "without", "tuned", "news", "-o", "strict")
    resilin("experts", "without", "joined", "news", "-o", "never")
    assert (place / "strict" / "model.safetensors").read_bytes() == (place / "never" / "model.safetensors").read_bytes()
    loose = resilin("experts", "without", "tuned", "news", "-o", "loose", "--keep-tuned")
    assert "no strict opt-out" in loose.stderr
    rows = load_pretrained(place / "loose").blocks[0].moe.router.weight
    assert torch.equal(rows, tuned.blocks[0].moe.router.weight[[0, 2]])
    gone = Expert.read(place / "news-expert").tensors["layers.0.row"].numpy().tobytes()
    assert not any(gone in file.read_bytes() for file in (place / "loose").iterdir())
    assert any(gone in file.read_bytes() for file in (place / "tuned").iterdir())
    done = run_command(place, ("experts", "join", "tuned", "news-expert", "-o", "more"))
    assert done.returncode == 2
    assert "was tuned with the experts it has" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("without", "joined", "nws", "-o", "x"), "did you mean 'news'?"),
        (("without", "joined", "public", "-o", "x"), "it stays"),
        (("without", "joined", "news", "-o", "x", "--top-k", "3"), "2 experts are left"),
        (("join", "anchor", "news-expert", "news-expert", "-o", "x"), "two experts are called 'news'"),
        (("join", "anchor", "news-expert", "-o", "x", "--top-k", "3"), "there are 2 experts"),
        (("join", "anchor", "anchor", "-o", "x"), "expert.json: no such file"),
        (("join", "runs/public", "news-expert", "-o", "x"), "experts.json: no such file"),
        (("join", "anchor", "news-expert", "-o", "joined"), "not empty"),
        (("seed", "runs/public", "x", "--name", "a", "--text", "news"), "resilin experts anchor"),
        (("seed", "anchor", "x", "--name", "no/name", "--text", "news"), "names an expert"),
        (("seed", "anchor", "x", "--name", "a"), "give some with --text"),
        (("pack", "runs/public", "x"), "expected model.use = 'resilin.joined.training:NewExpert'"),
        (("retuned", "runs/news", "-o", "x"), "expected model.use = 'resilin.joined.training:TunedRouter'"),
        (("anchor", "joined", "x", "--text", "news"), "has experts"),
        (("show", "anchor"), "experts.json: no such file"),
    ],
)
def test_what_cannot_be_is_told_before_anything_is_written(joined, place, arguments, told):
    done = run_command(place, ("experts", *arguments))
    assert done.returncode == 2
    assert told in done.stderr.replace("\n", " ")
    assert not (place / "x").exists()


def test_experts_of_other_anchors_and_tokenizers_are_refused(joined, place):
    expert = json.loads((place / "news-expert" / "expert.json").read_text())
    for key, told in (("anchor", "another anchor"), ("tokenizer", "another tokenizer")):
        folder = place / f"other-{key}"
        folder.mkdir()
        (folder / "expert.safetensors").write_bytes((place / "news-expert" / "expert.safetensors").read_bytes())
        (folder / "expert.json").write_text(json.dumps({**expert, key: "0" * 32}))
        done = run_command(place, ("experts", "join", "anchor", str(folder), "-o", "x"))
        assert done.returncode == 2
        assert told in done.stderr
        assert "news" in done.stderr
    (place / "other-anchor" / "expert.json").write_text(json.dumps({**expert, "digest": "0" * 32}))
    done = run_command(place, ("experts", "join", "anchor", "other-anchor", "-o", "x"))
    assert "is not the file that was written" in done.stderr


def test_a_run_whose_anchor_changed_is_not_packed(joined, resilin, place):
    resilin("train", "public.toml", "seed=5", "--folder", "runs/public2")
    resilin("experts", "anchor", "runs/public2", "anchor2", "--text", "public")
    done = run_command(place, ("train", "news.toml", "model.path=anchor2", "--folder", "runs/x"))
    assert done.returncode == 2
    assert "was made for another anchor" in done.stderr


def test_an_expert_can_be_trained_with_differential_privacy(joined, resilin, place):
    objective = """
[objective]
use = "resilin.objective.private:Private"
noise = 0.5
[objective.objective]
load_balance = 0.0
"""
    before, _, rest = (place / "news.toml").read_text().partition("[objective]\nload_balance = 0.0\n")
    (place / "private.toml").write_text(before + objective + rest)
    asked = ("train.steps=3", "train.clip_norm=0", "train.micro_batch_size=2")
    resilin("train", "private.toml", *asked, "--folder", "runs/private")
    expert = resilin("experts", "pack", "runs/private", "private-expert")
    assert "expert news" in expert.stdout
    steps = [json.loads(line) for line in (place / "runs" / "private" / "events.jsonl").read_text().splitlines()]
    assert all(0 <= e["logs"]["clipped"] <= 1 for e in steps if e["event"] == "step")
    told = resilin("experts", "privacy", "--noise", "1", "--batch", "10", "--samples", "1000", "--steps", "100")
    assert told.stdout.startswith("epsilon ")
    assert "delta 0.0001" in told.stdout


def test_proxies_are_public_documents(resilin, place):
    resilin("experts", "proxies", "--own", "code", "--public", "public", "--count", "1", "-o", "proxies.jsonl")
    (line,) = (place / "proxies.jsonl").read_text().splitlines()
    public = {file.read_text() for file in (place / "public").iterdir()}
    assert json.loads(line)["text"] in public


@pytest.mark.slow
@pytest.mark.parametrize("divided", ["data", "pipeline", "tensor"])
def test_two_workers_train_the_expert_that_one_trains(joined, resilin, place, divided):
    import subprocess
    import sys

    degrees = () if divided == "data" else (f"parallel.{divided}=2",)
    asked = ("news.toml", "train.micro_batch_size=2", "--folder", f"runs/{divided}", "parallel.workers=2", *degrees)
    command = (sys.executable, "-m", "resilin", "train", *asked)
    done = subprocess.run(command, cwd=place, capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == 0, done.stderr
    if not (place / "runs" / "alone").exists():
        resilin("train", "news.toml", "train.micro_batch_size=2", "--folder", "runs/alone")
        resilin("experts", "pack", "runs/alone", "alone-expert")
    resilin("experts", "pack", f"runs/{divided}", f"{divided}-expert")
    alone, found = (Expert.read(place / f"{name}-expert") for name in ("alone", divided))
    assert found.anchor == alone.anchor
    if divided != "tensor":
        assert found.digest == alone.digest
    for name, tensor in alone.tensors.items():
        torch.testing.assert_close(found.tensors[name], tensor, atol=1e-4, rtol=1e-3)
