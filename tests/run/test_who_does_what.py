"""What is told of a division before it starts is what workers then have."""

from __future__ import annotations

import sysconfig
from pathlib import Path
from typing import Any

import pytest
from forked import run_ranks

from resilin.config import parse_settings
from resilin.parallel.errors import ParallelError
from resilin.parallel.state import tensors_of
from resilin.parallel.world import World
from resilin.run.build import build_run
from resilin.run.settings import RunSettings
from resilin.run.who_does_what import Division, who_does_what


def settings_of(folder: Path, parallel: dict[str, Any], model: dict[str, Any]) -> RunSettings:
    text = folder / "text"
    if not text.exists():
        text.mkdir()
        for name in ("this.py", "textwrap.py", "string.py"):
            (text / name).with_suffix(".txt").write_bytes((Path(sysconfig.get_paths()["stdlib"]) / name).read_bytes())
    tree = {
        "source": {"paths": [str(text)], "cache": str(folder), "sequence_length": 32, "tokenizer": {"kind": "bytes"}},
        "model": {"hidden_size": 32, "layers": 4, "heads": 4, **model},
        "train": {"steps": 2, "batch_size": 8, "micro_batch_size": 2, "threads": 1, "device": "cpu"},
        "precision": {"compute": "fp32"},
        "evaluation": {"every": 0},
        "parallel": parallel,
    }
    return parse_settings(RunSettings, tree, "test")


def _measure(rank: int, folder: str, parallel: dict[str, Any], model: dict[str, Any]) -> dict[str, Any]:
    settings = settings_of(Path(folder), parallel, model)
    run = build_run(settings, world=World(settings.parallel.degrees(4), rank))
    weights = {id(p): p for p in run.model.parameters()}
    local = [getattr(p, "_local_tensor", p) for p in weights.values()]
    moments = [t for t in tensors_of(run.optimizer.state_dict()["parameters"]).values() if t.dim()]
    names = {name.split(".")[1] for name, _ in run.model.named_parameters() if name.startswith("blocks.")}
    slots = run.engine.slots(8, 0)
    return {
        "weights": sum(p.nbytes for p in local),
        "optimizer": sum(t.nbytes for t in moments),
        "blocks": sorted(map(int, names)),
        "slots": (slots.start, slots.stop),
    }


MOE = {"moe": {"experts": 4, "experts_per_token": 2, "expert_size": 24}}
CASES = [
    ({"data": 4}, {}),
    ({"data": 2, "tensor": 2}, {"tie_embeddings": True}),
    ({"pipeline": 2, "data": 2}, {"tie_embeddings": True}),
    ({"pipeline": 2, "chunks": 2, "schedule": "interleaved", "tensor": 2}, {}),
    ({"data": 2, "context": 2}, {}),
    ({"data": 4, "expert": 2}, MOE),
]


@pytest.mark.parametrize(("parallel", "model"), CASES, ids=str)
def test_shares_are_those_of_real_workers(tmp_path: Path, parallel: dict[str, Any], model: dict[str, Any]):
    settings = settings_of(tmp_path, parallel, model)
    told = who_does_what(settings, 4)
    measured = run_ranks(4, _measure, str(tmp_path), parallel, model)
    for share, real in zip(told.shares, measured, strict=True):
        assert share.weights == real["weights"]
        assert share.optimizer == real["optimizer"]
        assert (share.slots.start, share.slots.stop) == real["slots"]
        if "pipeline" in parallel:
            assert sorted(block for run in share.blocks for block in run) == real["blocks"]


def told(tmp_path: Path, workers: int, parallel: dict[str, Any], **model: Any) -> Division:
    return who_does_what(settings_of(tmp_path, parallel, model), workers)


def test_first_stages_keep_more_micro_batches_and_the_bubble_is_that_of_1f1b(tmp_path: Path):
    division = told(tmp_path, 4, {"pipeline": 4})
    assert [share.in_flight for share in division.shares] == [4, 3, 2, 1]
    assert division.bubble == pytest.approx(3 / 4)  # (p - 1) / m
    assert division.groups == {"hand activations on": [(0, 1, 2, 3)]}


def test_the_head_of_a_tied_embedding_waits_for_its_other_part(tmp_path: Path):
    plain = told(tmp_path, 4, {"pipeline": 4, "reduction": "fast"}, tie_embeddings=True)
    exact = told(tmp_path, 4, {"pipeline": 4}, tie_embeddings=True)
    more = [a.gradients - b.gradients for a, b in zip(exact.shares, plain.shares, strict=True)]
    head = told(tmp_path, 1, {}).shares[0].weights - told(tmp_path, 1, {}, tie_embeddings=True).shares[0].weights
    assert more[:3] == [0, 0, 0]
    assert head < more[3] < 4 * head  # of 4 micro-batches under way
    assert more[3] % head == 0


def test_fsdp_gathers_by_step_or_by_block(tmp_path: Path):
    parallel = {"pipeline": 2, "data": 2, "sharding": "fsdp"}
    step, block = (told(tmp_path, 4, {**parallel, "gather": how}) for how in ("step", "block"))
    assert told(tmp_path, 4, parallel).shares == step.shares
    zero = told(tmp_path, 4, {"pipeline": 2, "data": 2})
    for held, given_up, whole in zip(step.shares, block.shares, zero.shares, strict=True):
        assert held.weights == given_up.weights + whole.weights
        assert (held.gradients, held.optimizer) == (whole.gradients, given_up.optimizer)
        assert given_up.gradients == given_up.weights < whole.weights


def test_many_workers_take_no_memory_and_no_processes(tmp_path: Path):
    division = told(tmp_path, 64, {"tensor": 4, "data": 8, "pipeline": 2}, hidden_size=4096, heads=32, layers=8)
    assert len(division.shares) == 64
    whole = told(tmp_path, 1, {}, hidden_size=4096, heads=32, layers=8).shares[0]
    assert sum(share.weights for share in division.shares) > whole.weights
    assert max(share.weights for share in division.shares) < whole.weights / 7


def test_what_cannot_be_divided_is_told(tmp_path: Path):
    with pytest.raises(ParallelError, match=r"tensor 3 = 3, which does not divide 4"):
        told(tmp_path, 4, {"tensor": 3})
    with pytest.raises(ParallelError, match=r"4 blocks cannot be divided over 8 stages"):
        told(tmp_path, 8, {"pipeline": 8})
    settings = settings_of(tmp_path, {"pipeline": 4}, {})
    train = settings.train.model_copy(update={"micro_batch_size": 0})
    with pytest.raises(ParallelError, match=r"set train\.micro_batch_size"):
        who_does_what(settings.model_copy(update={"train": train}), 4)


def test_an_elastic_run_is_shown_as_it_begins(tmp_path: Path):
    settings = settings_of(tmp_path, {"expert": 2}, MOE)
    elastic = settings.model_copy(update={"cluster": settings.cluster.model_copy(update={"elastic": True})})
    found = who_does_what(elastic, 3)  # which do not divide into pairs: all three share one set of four experts
    assert [(one.coordinates, one.micro_batches) for one in found.shares] == [
        ({"dp": rank, "ep": rank}, 2) for rank in range(3)
    ]
    assert [len(one.slots) for one in found.shares] == [3, 3, 2]
    assert found.shares[0].weights > found.shares[1].weights == found.shares[2].weights
    with pytest.raises(ParallelError, match=r"parallel\.expert is 2"):
        who_does_what(settings, 3)
    both = settings_of(tmp_path, {"expert": 2, "pipeline": 2}, MOE).model_copy(update={"cluster": elastic.cluster})
    shares = who_does_what(both, 4).shares  # all of a stage share every tick
    assert [(one.coordinates["pp"], list(one.slots), one.micro_batches) for one in shares] == [
        (rank // 2, [0, 1, 4, 5] if rank % 2 == 0 else [2, 3, 6, 7], 2) for rank in range(4)
    ]
    stages = settings_of(tmp_path, {"pipeline": 2}, {})
    stages = stages.model_copy(update={"cluster": elastic.cluster})
    with pytest.raises(ParallelError, match="in pipeline stages of unlike numbers"):
        who_does_what(stages, 3)
