"""A tiny real run: the decoder, next-token loss and AdamW over sequences that a rule generates."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from elastic_runs import alone, text_at

from resilin.checkpoint.folder import CheckpointFolder
from resilin.keys import Keys
from resilin.models.decoder_settings import DecoderSettings
from resilin.models.settings import ModelContext
from resilin.nouns import Batch, State
from resilin.objective.next_token import NextToken
from resilin.optim.adamw import AdamW
from resilin.run.run import Pace, Run

VOCABULARY, LENGTH = 32, 16


class Counting:
    """Rows count upwards from a keyed start, modulo the vocabulary: learnable, endless, a function of (step, slot)."""

    vocab_size = VOCABULARY
    sequence_length = LENGTH

    def __init__(self, batch_size: int = 8, seed: int = 0, length: int | None = None) -> None:
        self.batch_size, self.seed, self.length = batch_size, seed, length

    def __len__(self) -> int:
        assert self.length is not None
        return self.length

    def slots(self, step: int) -> int:
        return self.batch_size

    def fetch(self, step: int, slots: Sequence[int]) -> Batch:
        slots_B = torch.tensor(list(slots))
        start_B1 = Keys(self.seed, step, slots_B).bits((1,)) % VOCABULARY
        row_BT = (start_B1 + torch.arange(LENGTH + 1)) % VOCABULARY
        return Batch(slots_B, {"tokens": row_BT[:, :-1], "labels": row_BT[:, 1:]})

    def state_dict(self) -> State:
        return {}

    def load_state_dict(self, state: State) -> None:
        assert state == {}


def build_tiny_run(folder: Path | None = None, **changes: Any) -> Run:
    model_settings = DecoderSettings(
        vocab_size=VOCABULARY, hidden_size=32, layers=2, heads=2, mlp_size=64, dropout=changes.pop("dropout", 0.0)
    )
    seed = changes.pop("seed", 0)
    pace = {"steps": 8, "micro_batch_size": 8, "clip_norm": 1.0} | changes.pop("pace", {})
    model = model_settings.build(ModelContext(seed, None))
    run = Run(
        source=changes.pop("source") if "source" in changes else Counting(seed=seed),
        model=model,
        objective=changes.pop("objective", None) or NextToken().build(),
        optimizer=AdamW(lr=1e-2).build(model, pace["steps"]),
        pace=Pace(**pace),
        seed=seed,
        device=torch.device("cpu"),
        autocast=nullcontext,
        checkpoints=CheckpointFolder(folder, keep_last=2) if folder is not None else None,
    )
    for name, value in changes.items():
        setattr(run, name, value)
    return run


@pytest.fixture
def tiny_run() -> Callable[..., Run]:
    torch.set_num_threads(1)
    return build_tiny_run


@pytest.fixture
def counting() -> type[Counting]:
    return Counting


def digest_of(state: Any) -> str:
    """A hash over every bit of a state tree."""
    import hashlib
    import json

    digest = hashlib.sha256()

    def visit(node: Any, path: str) -> None:
        if isinstance(node, dict):
            for key in sorted(node):
                visit(node[key], f"{path}/{key}")
        elif isinstance(node, list | tuple):
            for index, item in enumerate(node):
                visit(item, f"{path}/{index}")
        elif isinstance(node, torch.Tensor):
            digest.update(path.encode())
            digest.update(
                node.detach().contiguous().view(torch.uint8).numpy().tobytes() if node.ndim else str(node).encode()
            )
        else:
            digest.update(f"{path}={json.dumps(node)}".encode())

    visit(state, "")
    return digest.hexdigest()


@pytest.fixture
def digest() -> Callable[[Any], str]:
    return digest_of


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What elastic runs learn from."""
    return text_at(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="session")
def undisturbed(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An elastic run's counterpart: one process, to which nothing happens."""
    return alone(text, tmp_path_factory.mktemp("elastic") / "one")
