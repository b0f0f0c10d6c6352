"""A run that is saved in one layout and goes on in another, again and again, beside one that never changed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from forked import run_ranks
from ports import free_port
from tiny_text import text_source

from resilin.checkpoint.folder import CheckpointFolder
from resilin.cluster.position import Position
from resilin.config import parse_settings
from resilin.run.settings import RunSettings
from resilin.run.start import start_run

EACH = 2  # steps in one layout

DENSE = {"hidden_size": 32, "layers": 4, "heads": 4, "kv_heads": 2, "mlp_size": 48}
EXPERTS = {
    **DENSE,
    "layers": 2,
    "moe": {"experts": 4, "experts_per_token": 2, "expert_size": 24, "dense_layers": []},
}
Layout = tuple[int, dict[str, Any]]


def settings_of(text: Path, model: dict[str, Any], steps: int, parallel: dict[str, Any]) -> RunSettings:
    parallel = dict(parallel)
    tree = {
        "source": text_source(text),
        "model": model,
        "optimizer": {"lr": 3e-3, "schedule": {"use": "resilin.optim.schedule:Constant"}},
        "train": {"steps": steps, "batch_size": 8, "micro_batch_size": 1, "threads": 1, "device": "cpu"},
        "precision": {"compute": "fp32", "compile": parallel.pop("compile", False)},
        "parallel": {"timeout": 60, **parallel},
        "evaluation": {"every": EACH, "batches": 3},
        "checkpoint": {"every": EACH, "keep_last": 50},
        "log": {"tensorboard": False, "live": False},
    }
    return parse_settings(RunSettings, tree, "test")


def go(
    rank: int, text: Path, folder: Path, model: dict[str, Any], steps: int, workers: int, parallel: Any, port: int
) -> tuple[str, dict[str, float]]:
    torch.set_num_threads(1)
    place = Position(rank, workers, rank, workers, "127.0.0.1", port) if workers > 1 else None
    settings = settings_of(text, model, steps, parallel)
    _, outcome = start_run(settings, folder, resume=True, accept_changes=True, place=place)
    return outcome.reason, outcome.metrics


def states(folder: Path, step: int) -> dict[str, torch.Tensor]:
    state = CheckpointFolder(folder / "checkpoints").load(step)
    found = {f"model/{name}": tensor for name, tensor in state["model"].items()}
    for name, moments in state["optimizer"]["parameters"].items():
        found |= {f"{key}/{name}": tensor for key, tensor in moments.items()}
    return found


def check_chain(tmp_path: Path, model: dict[str, Any], chain: list[Layout], exact_until: int) -> None:
    text = tmp_path / "text.txt"
    text.write_text("It was the best of times, it was the worst of times. " * 200)
    straight, changing = tmp_path / "straight", tmp_path / "changing"
    total = EACH * len(chain)
    run_ranks(1, go, text, straight, model, total, 1, {}, 0, connect=False)
    for number, (workers, parallel) in enumerate(chain):
        steps = EACH * (number + 1)
        told = run_ranks(
            workers, go, text, changing, model, steps, workers, parallel, free_port(), connect=False, timeout=500
        )
        assert {reason for reason, _ in told} == {"completed"}
        assert len({tuple(sorted(metrics.items())) for _, metrics in told}) == 1  # all workers know the same
        expected, found = states(straight, steps), states(changing, steps)
        assert expected.keys() == found.keys()
        for name, tensor in expected.items():
            where = f"{name} after {steps} steps, the last ones with {parallel}"
            if number < exact_until:
                assert torch.equal(found[name], tensor), where
            else:
                torch.testing.assert_close(
                    found[name], tensor, rtol=2e-3, atol=2e-3 * float(tensor.abs().max()), msg=where
                )


def test_a_dense_model_goes_from_layout_to_layout(tmp_path):
    chain: list[Layout] = [
        (3, {"data": 3}),
        (4, {"pipeline": 2, "data": 2, "schedule": "interleaved", "chunks": 2}),
        (1, {}),
        (2, {"tensor": 2}),
        (1, {}),
    ]
    check_chain(tmp_path, DENSE, chain, exact_until=3)


@pytest.mark.slow
def test_a_dense_model_goes_through_many_layouts(tmp_path):
    chain: list[Layout] = [
        (3, {"data": 3}),
        (2, {"pipeline": 2}),
        (4, {"pipeline": 2, "data": 2, "schedule": "interleaved", "chunks": 2}),
        (1, {}),
        (2, {"tensor": 2}),
        (2, {"context": 2}),
        (2, {"data": 2, "sharding": "fsdp"}),
        (4, {"pipeline": 2, "data": 2, "sharding": "fsdp"}),
        (4, {"pipeline": 2, "tensor": 2}),
        (1, {}),
    ]
    check_chain(tmp_path, DENSE, chain, exact_until=4)


@pytest.mark.slow
def test_a_model_with_tied_embeddings_goes_from_layout_to_layout(tmp_path):
    chain: list[Layout] = [
        (2, {"pipeline": 2}),
        (2, {"pipeline": 2, "schedule": "zb-v"}),
        (4, {"pipeline": 2, "data": 2}),
        (2, {"data": 2}),
        (4, {"pipeline": 2, "data": 2, "sharding": "fsdp", "schedule": "interleaved", "chunks": 2}),
        (2, {"pipeline": 2}),
    ]
    check_chain(tmp_path, {**DENSE, "tie_embeddings": True}, chain, exact_until=4)


@pytest.mark.slow
def test_experts_go_from_layout_to_layout(tmp_path):
    chain: list[Layout] = [
        (2, {"data": 2}),
        (2, {"expert": 2}),
        (4, {"data": 4, "expert": 2, "sharding": "fsdp"}),
        (4, {"pipeline": 2, "data": 2, "expert": 2, "sharding": "fsdp"}),
        (4, {"tensor": 2, "expert": 2}),
        (1, {}),
    ]
    check_chain(tmp_path, EXPERTS, chain, exact_until=1)


@pytest.mark.slow
def test_an_adapted_model_goes_from_layout_to_layout(tmp_path):
    model = {
        "use": "resilin.adapt.adapted:Adapted",
        "model": {**DENSE, "layers": 2},
        "adapters": {"default": {"method": "lora", "rank": 4}},
    }
    chain: list[Layout] = [(2, {"pipeline": 2}), (2, {"tensor": 2}), (1, {})]
    check_chain(tmp_path, model, chain, exact_until=1)


@pytest.mark.slow
def test_a_compiled_model_goes_from_layout_to_layout(tmp_path):
    chain: list[Layout] = [
        (2, {"tensor": 2, "compile": "blocks", "timeout": 400}),
        (2, {"pipeline": 2, "compile": True, "timeout": 400}),
        (1, {}),
    ]
    check_chain(tmp_path, {**DENSE, "layers": 2}, chain, exact_until=0)


@pytest.mark.parametrize(
    ("parallel", "workers", "message"),
    [
        ({"pipeline": 3}, 3, "cannot be divided over 3 stages"),
        ({"tensor": 3}, 3, "cannot be cut over 3 ranks"),
        (
            {"pipeline": 2, "data": 2, "sharding": "fsdp", "schedule": "zb-h1", "gather": "block"},
            4,
            "cuts backward passes in halves",
        ),
    ],
)
def test_what_does_not_fit_is_told_at_every_worker(tmp_path, parallel, workers, message):
    text = tmp_path / "text.txt"
    text.write_text("It was the best of times. " * 200)
    small = {**DENSE, "layers": 2, "heads": 2}
    with pytest.raises(AssertionError, match=message):
        run_ranks(workers, go, text, tmp_path / "run", small, 2, workers, parallel, free_port(), connect=False)
