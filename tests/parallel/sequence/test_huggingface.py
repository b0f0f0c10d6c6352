"""Models saved by `transformers`, their rows divided over ranks: the logits of `transformers` on whole rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from forked import run_ranks

from resilin.models.huggingface import load_pretrained
from resilin.nouns import Batch
from resilin.parallel.group import Group
from resilin.parallel.sequence.part import RankPart
from resilin.parallel.sequence.ring import ring
from resilin.parallel.sequence.shard import shard_sequence
from resilin.parallel.sequence.ulysses import ulysses

transformers = pytest.importorskip("transformers")

SIZES = {
    "vocab_size": 96, "hidden_size": 36, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 6,
    "num_key_value_heads": 2, "initializer_range": 0.2, "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 500.0, "factor": 2.0}}),
    "qwen2": ("Qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}),
}


@pytest.fixture(scope="module", params=FAMILIES)
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.Tensor]:
    """A model's folder, and its logits of a text of 18 tokens."""
    family, more = FAMILIES[request.param]
    torch.manual_seed(5)
    config = getattr(transformers, f"{family}Config")(**SIZES, **more)
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    folder = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder)
    with torch.no_grad():
        return folder, model(_text()).logits


def _text() -> torch.Tensor:
    return torch.arange(36).view(2, 18) * 7 % 96


@torch.no_grad()
def _logits(rank: int, folder: Path) -> list[tuple[Any, Any]]:
    group, found = Group.of(), []
    batch = Batch(torch.arange(2), {"tokens": _text()})
    for kind, divide in (("ulysses", ulysses), ("ring", ring)):
        model = load_pretrained(folder)
        divide(model, group)
        mine = shard_sequence(batch, group, kind)
        out = model(mine["tokens"], mine["positions"], mine.get("documents"))
        place = RankPart(kind, group).places(mine["tokens"].shape[1], torch.device("cpu"))
        found.append((place.numpy(), model.logits(out.hidden_BTD).numpy()))
    return found


@pytest.mark.parametrize("ranks", [2, 3])
def test_logits_of_divided_rows_are_those_of_transformers(saved: tuple[Path, torch.Tensor], ranks: int) -> None:
    folder, wanted = saved
    for pieces in zip(*run_ranks(ranks, _logits, folder), strict=True):
        place = torch.cat([torch.from_numpy(at) for at, _ in pieces])
        logits = torch.cat([torch.from_numpy(part) for _, part in pieces], dim=1)[:, place.argsort()]
        torch.testing.assert_close(logits[:, :18], wanted, rtol=1e-4, atol=1e-4)
