"""A run whose experts live in tiers is, to the bit, the run that has them in memory, and its checkpoints are too."""

from __future__ import annotations

import gc
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import run_ranks
from ports import free_port
from tiny_text import text_source

from resilin.checkpoint.folder import CheckpointFolder
from resilin.cluster.position import Position
from resilin.config import UserError, parse_settings
from resilin.memory.expert_store import ExpertStore, Geometry
from resilin.memory.tier_report import planned_bytes
from resilin.models.settings import ModelContext
from resilin.parallel.errors import ParallelError
from resilin.parallel.world import World
from resilin.run.build import build_run
from resilin.run.divided import check_division
from resilin.run.elastic_place import check_elastic
from resilin.run.export import export_model
from resilin.run.folder import changed_settings
from resilin.run.forecast import forecast
from resilin.run.open_model import open_model
from resilin.run.settings import RunSettings
from resilin.run.start import start_run

MODEL = {
    "hidden_size": 32,
    "layers": 3,
    "heads": 2,
    "kv_heads": 1,
    "mlp_size": 48,
    "moe": {"experts": 12, "experts_per_token": 1, "expert_size": 24, "dense_layers": [1], "normalise_weights": False},
}
RECORD = 12 * 3 * 32 * 24 + 24  # weights and two moments; three counts of steps, rounded up; the count of updates
SMALL = {"experts": {"host_bytes": 3 * RECORD}}
EVERYWHERE = {"experts": {"host_bytes": 100 * RECORD, "prefetch": False}}


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("It was the best of times, it was the worst of times. " * 200)
    return path


def settings_of(text: Path, steps: int = 4, **changes: Any) -> RunSettings:
    tree: dict[str, Any] = {
        "source": text_source(text),
        "model": MODEL,
        "objective": {"load_balance": 0.0},
        "optimizer": {"lr": 3e-3},
        "train": {"steps": steps, "batch_size": 3, "micro_batch_size": 1, "threads": 1, "device": "cpu"},
        "precision": {"compute": "fp32"},
        "evaluation": {"every": 2, "batches": 2},
        "checkpoint": {"every": 2, "keep_last": 50},
        "log": {"tensorboard": False, "live": False},
    }
    for name, change in changes.items():
        tree[name] = {**tree.get(name, {}), **change}
    return parse_settings(RunSettings, tree, "test")


def train(settings: RunSettings, folder: Path, resume: bool = False) -> dict[str, torch.Tensor]:
    """All tensors of the last checkpoint."""
    torch.set_num_threads(1)
    _, outcome = start_run(settings, folder, resume=resume)
    assert outcome.reason == "completed"
    return states(folder, outcome.step)


def states(folder: Path, step: int) -> dict[str, torch.Tensor]:
    state = CheckpointFolder(folder / "checkpoints").load(step)
    found = {f"model/{name}": tensor for name, tensor in state["model"].items()}
    for name, moments in state["optimizer"]["parameters"].items():
        found |= {f"{key}/{name}": tensor for key, tensor in moments.items()}
    return found


def unlike(mine: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> list[str]:
    assert mine.keys() == theirs.keys()
    return [name for name in mine if not torch.equal(mine[name], theirs[name])]


def events(folder: Path, kind: str) -> list[dict[str, Any]]:
    lines = (folder / "events.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == kind]


RULES = [{"match": "blocks.2.*experts.down", "lr_scale": 0.3, "weight_decay": 0.0}]
VARIANTS = {
    "clipped, rules": {"train": {"clip_norm": 0.05}, "optimizer": {"rules": RULES}},
    "momentum, bf16, recompute": {
        "optimizer": {"use": "resilin.optim.sgd:SGD", "lr": 0.1, "weight_decay": 0.01},
        "precision": {"compute": "bf16"},
        "model": {**MODEL, "recompute": "block", "moe": {**MODEL["moe"], "experts_per_token": 2}},
    },
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_training_is_that_of_the_run_in_memory_to_the_bit(tmp_path, text, variant):
    changes = VARIANTS[variant]
    want = train(settings_of(text, **changes), tmp_path / "memory")
    assert unlike(train(settings_of(text, memory=SMALL, **changes), tmp_path / "tiers"), want) == []
    told = [events(tmp_path / name, "step") for name in ("tiers", "memory")]
    for mine, theirs in zip(*told, strict=True):
        assert (mine["loss"], mine["grad_norm"]) == (theirs["loss"], theirs["grad_norm"])
    assert told[0][-1]["logs"]["experts/active"] < 1, "the test needs experts that no token visits"
    evaluations = [[event["metrics"] for event in events(tmp_path / name, "eval")] for name in ("tiers", "memory")]
    assert evaluations[0] == evaluations[1]


def test_a_run_goes_on_with_and_without_tiers_from_either(tmp_path, text):
    constant = {"optimizer": {"lr": 3e-3, "schedule": {"use": "resilin.optim.schedule:Constant"}}}
    every = {**constant, "checkpoint": {"every": 1, "keep_last": 50}, "evaluation": {"every": 0}}
    train(settings_of(text, steps=3, **every), tmp_path / "straight")
    for step, memory in enumerate((SMALL, {}, EVERYWHERE), start=1):
        settings = settings_of(text, steps=step, memory=memory, **every)
        start_run(settings, tmp_path / "changing", resume=step > 1, accept_changes=True)  # of train.steps only
        assert unlike(states(tmp_path / "changing", step), states(tmp_path / "straight", step)) == []
    assert changed_settings(settings, settings_of(text, steps=3, **every)) == []  # where experts live is none


def test_files_of_experts_go_with_the_run_and_those_of_a_dead_one_with_the_next(tmp_path, text):
    disk = tmp_path / "disk"
    settings = settings_of(text, memory={"experts": {"folder": str(disk)}})
    abandoned = disk / "worker-00000-gone"
    ExpertStore(abandoned, Geometry(1, 1, 100, slots=1)).close()
    one, other = build_run(settings), build_run(settings)
    names = {path.name for path in disk.iterdir()}
    assert len(names) == 2
    assert abandoned.name not in names
    del one, other
    gc.collect()
    assert list(disk.iterdir()) == []


def test_a_step_that_is_not_finite_leaves_experts_as_they_were(tmp_path, text):
    found = []
    for memory in ({}, SMALL):
        run = build_run(settings_of(text, memory=memory, train={"non_finite": "skip"}))
        objective = run.objective

        def broken(model, batch, keys, inner=objective, run=run):
            loss = inner(model, batch, keys)
            bad = keys is not None and run.step == 1
            return type(loss)(loss.sum * float("inf"), loss.units, loss.logs) if bad else loss

        run.engine._objective = broken
        run.train()
        assert run.skipped == 1
        state = run.state_dict()
        found.append({n: t if isinstance(t, torch.Tensor) else t.read() for n, t in state["model"].items()})
    assert unlike(found[0], found[1]) == []


def test_a_tiered_run_is_opened_and_exported_as_any_other(tmp_path, text):
    for name, memory in {"memory": {}, "tiers": SMALL}.items():
        train(settings_of(text, steps=2, model={**MODEL, "qk_norm": "rms"}, memory=memory), tmp_path / name)
        opened = open_model(tmp_path / name)
        export_model(opened.model, opened.tokenizer, tmp_path / f"{name}-hf")
    files = [(tmp_path / f"{name}-hf" / "model.safetensors").read_bytes() for name in ("memory", "tiers")]
    assert files[0] == files[1]


def live_bytes(but: set[int]) -> int:
    """Of all tensors that there are, and their gradients, each memory once."""
    found = {}
    for each in gc.get_objects():
        if type(each) in (torch.Tensor, torch.nn.Parameter):
            for tensor in (each, each.grad if each.is_leaf else None):
                if tensor is not None and tensor.device.type == "cpu" and tensor.layout == torch.strided:
                    storage = tensor.untyped_storage()
                    found[storage.data_ptr()] = storage.nbytes()
    return sum(size for place, size in found.items() if place not in but)


def test_memory_is_less_by_what_experts_take_and_more_by_the_cache(text):
    """Counted after steps, when all gradients of the run in memory are still there."""
    held: list[int] = []
    for memory in ({}, SMALL):
        gc.collect()
        before = live_bytes(set())
        run = build_run(settings_of(text, memory=memory, evaluation={"every": 0}))
        mapped = {each.untyped_storage().data_ptr() for each in run.optimizer.tiers.store._maps} if memory else set()
        found: list[int] = []
        run.listeners = [lambda event, f=found, m=mapped: f.append(live_bytes(m)) if event.event == "step" else None]
        run.train()
        held.append(max(found) - before)
        if memory:
            report, experts = run.optimizer.tiers.report(), 2 * 12 * 3 * 32 * 24  # of two layers with twelve each
        del run
    saved = held[0] - held[1]
    cache = (3 + 2) * RECORD  # three states, one that leaves, one that only passes
    assert report.host_bytes <= cache
    assert saved == pytest.approx(16 * experts - report.host_bytes, rel=0.02)
    used = 16  # tokens of a micro-batch: of so many experts of a layer at most
    assert report.gradient_bytes <= 4 * experts * report.active * 1.5
    assert report.device_bytes <= 4 * 3 * 32 * 24 * min(used, 12) * 3  # two layers, and gradients of one


WRONG = {
    "no experts": ({"model": {**MODEL, "moe": None}}, {}, r"set model\.moe"),
    "no room": ({}, {"host_bytes": 9}, "less than the state of one expert, 27672 bytes"),
    "recorded": ({"optimizer": {"record": ["update_rms"]}}, {}, r"optimizer\.record needs all elements"),
    "unlike": (
        {"model": {**MODEL, "layer_sizes": [{}, {}, {"experts": 4}]}},
        {},
        "4 of 24 x 32, trained; 12 of 24 x 32",
    ),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_what_cannot_live_in_tiers_is_refused_before_anything_is_computed(text, wrong):
    changes, experts, message = WRONG[wrong]
    with pytest.raises(UserError, match=message):
        build_run(settings_of(text, memory={"experts": experts}, **changes))


@pytest.mark.parametrize(
    ("workers", "parallel", "message"),
    [
        (2, {}, r"set parallel\.expert = 2"),
        (4, {"expert": 2}, r"set parallel\.expert = 4"),
        (4, {"expert": 2, "tensor": 2}, r"not with parallel\.tensor"),
        (4, {"expert": 2, "pipeline": 2}, r"not with parallel\.pipeline"),
        (4, {"expert": 4, "context": 2}, r"not with parallel\.context"),
        (2, {"expert": 2, "sharding": "fsdp"}, "not 'fsdp'"),
    ],
)
def test_divisions_that_give_an_expert_to_several_workers_are_refused(text, workers, parallel, message):
    settings = settings_of(text, memory=SMALL, parallel=parallel, train={"batch_size": 4})
    with pytest.raises(ParallelError, match=message):
        check_division(settings, World(settings.parallel.degrees(workers), 0), None, None, set())
    elastic = settings_of(text, memory=SMALL, cluster={"elastic": True})
    with pytest.raises(ParallelError, match=r"set cluster\.elastic = false"):
        check_elastic(elastic, elastic.parallel.degrees(2), torch.device("cpu"))


def test_what_tiers_will_hold_is_told_before_and_is_what_they_hold(text):
    settings = settings_of(text, memory=SMALL)
    told = dict(forecast(settings).groups["experts, in place of the above (at most)"])
    assert told["disk"] == f"{24 * 28672 / 2**20:.1f} MiB"  # states of 27,672 bytes, in pages
    run = build_run(settings)
    outline = settings.model.outline(ModelContext(0, run.source.vocab_size))
    planned = planned_bytes(settings.memory.experts, settings.optimizer, outline, 4)
    run.train()
    report = run.optimizer.tiers.report()
    assert planned["disk"] == report.disk_bytes
    assert RECORD * 3 < report.host_bytes <= planned["host, cache"]
    assert 0 < report.gradient_bytes <= planned["host, gradients"]
    assert 0 < report.device_bytes <= planned["device"]


def go(rank: int, folder: Path, settings: RunSettings, workers: int, port: int) -> str:
    torch.set_num_threads(1)
    place = Position(rank, workers, rank, workers, "127.0.0.1", port)
    return start_run(settings, folder, resume=True, accept_changes=True, place=place)[1].reason


@pytest.mark.slow  # three times two processes
def test_experts_of_two_workers_each_on_its_own_disk(tmp_path, text):
    shared = {"train": {"batch_size": 4, "clip_norm": 0.05}, "parallel": {"expert": 2, "timeout": 60}}
    plain, tiered = settings_of(text, **shared), settings_of(text, memory=SMALL, **shared)
    run_ranks(2, go, tmp_path / "memory", plain, 2, free_port(), connect=False)
    run_ranks(2, go, tmp_path / "tiers", tiered, 2, free_port(), connect=False)
    want, found = (states(tmp_path / name, 4) for name in ("memory", "tiers"))
    assert want.keys() == found.keys()
    for name, tensor in want.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-7, msg=name)
    # and on from there: by one process that has all in tiers, and by two that have all in memory
    alone = settings_of(text, steps=6, memory=SMALL, train=shared["train"])
    start_run(alone, tmp_path / "tiers", resume=True, accept_changes=True)
    longer = settings_of(text, steps=6, **shared)
    run_ranks(2, go, tmp_path / "memory", longer, 2, free_port(), connect=False)
    want, found = (states(tmp_path / name, 6) for name in ("memory", "tiers"))
    for name, tensor in want.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-6, msg=name)
