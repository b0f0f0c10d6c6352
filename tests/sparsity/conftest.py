"""Tiny sparse decoders and runs of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from resilin.checkpoint.folder import CheckpointFolder
from resilin.config import parse_settings
from resilin.keys import Keys
from resilin.models.decoder import Decoder
from resilin.models.settings import ModelContext
from resilin.nouns import Batch, State
from resilin.objective.next_token import NextToken
from resilin.run.run import Pace, Run
from resilin.sparsity.adamw import SparseAdamW
from resilin.sparsity.settings import Sparse

VOCABULARY, LENGTH = 32, 16
DENSE = {"vocab_size": VOCABULARY, "hidden_size": 16, "layers": 2, "heads": 2, "mlp_size": 32, "init_std": 0.3}


def build_sparse(seed: int = 0, dtype: torch.dtype = torch.float32, dense: Any = None, **fields: Any) -> Decoder:
    settings = parse_settings(Sparse, {"model": {**DENSE, **(dense or {})}, **fields}, "x.toml")
    model = settings.build(ModelContext(seed, None)).to(dtype)
    assert isinstance(model, Decoder)
    return model


class Counting:
    """Rows count upwards from a keyed start: learnable, endless, a function of (step, slot)."""

    vocab_size, sequence_length = VOCABULARY, LENGTH

    def __init__(self, batch_size: int = 8, seed: int = 0) -> None:
        self.batch_size, self.seed = batch_size, seed

    def slots(self, step: int) -> int:
        return self.batch_size

    def fetch(self, step: int, slots: Sequence[int]) -> Batch:
        slots_B = torch.tensor(list(slots))
        start_B1 = Keys(self.seed, step, slots_B).bits((1,)) % VOCABULARY
        row_BT = (start_B1 * 7 + torch.arange(LENGTH + 1) * 3) % VOCABULARY
        return Batch(slots_B, {"tokens": row_BT[:, :-1], "labels": row_BT[:, 1:]})

    def state_dict(self) -> State:
        return {}

    def load_state_dict(self, state: State) -> None:
        assert state == {}


def build_run(folder: Path | None = None, *, steps: int = 8, micro: int = 8, sparse: Any = None, **more: Any) -> Run:
    torch.set_num_threads(1)
    model = more.pop("model", None) or build_sparse(**(sparse or {}))
    optimizer = more.pop("optimizer", None) or SparseAdamW(lr=1e-2, ramp={"maximum": 0.05, "steps": 4})
    return Run(
        source=Counting(),
        model=model,
        objective=more.pop("objective", None) or NextToken().build(),
        optimizer=optimizer.build(model, steps),
        pace=Pace(steps=steps, micro_batch_size=micro, clip_norm=1.0),
        seed=0,
        device=torch.device("cpu"),
        autocast=nullcontext,
        checkpoints=CheckpointFolder(folder, keep_last=2) if folder is not None else None,
        **more,
    )


@pytest.fixture
def sparse_model() -> Callable[..., Decoder]:
    return build_sparse


@pytest.fixture
def sparse_run() -> Callable[..., Run]:
    return build_run
