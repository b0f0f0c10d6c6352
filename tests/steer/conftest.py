"""A pool of short rows in the hand, and a run on it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import Field
from torch import Tensor

from resilin.data.errors import DataError
from resilin.data.settings import SourceContext, SourceSettings
from resilin.keys import Keys
from resilin.models.decoder_settings import DecoderSettings
from resilin.models.settings import ModelContext
from resilin.nouns import Batch, State
from resilin.objective.next_token import NextToken
from resilin.optim.adamw import AdamW
from resilin.run.run import Pace, Run
from resilin.steer.look import Look

V, T = 16, 8


class RowPool:
    """Rows of tokens by number; parts differ in which half of the vocabulary they use."""

    vocab_size, sequence_length, tokenizer = V, T, None

    def __init__(self, parts: Sequence[int], seed: int = 0, batch_size: int = 4) -> None:
        self.pool_parts, self.batch_size = tuple(parts), batch_size
        self.digest = f"rows {tuple(parts)} {seed}"
        made = []
        for part, size in enumerate(parts):
            start = Keys(seed, part, torch.arange(size)).bits((1,)) % V
            made.append((start + torch.arange(T + 1) * (part + 1)) % V)
        self.rows_NT = torch.cat(made) if made else torch.zeros(0, T + 1, dtype=torch.int64)

    def read(self, samples: Sequence[int]) -> Batch:
        rows = self.rows_NT[torch.tensor(list(samples), dtype=torch.int64)]
        return Batch(torch.arange(len(rows)), {"tokens": rows[:, :-1], "labels": rows[:, 1:].clone()})

    def slots(self, step: int) -> int:
        return self.batch_size

    def __len__(self) -> int:
        return max(1, sum(self.pool_parts) // self.batch_size)

    def fetch(self, step: int, slots: Sequence[int]) -> Batch:
        batch = self.read([(step * self.batch_size + slot) % sum(self.pool_parts) for slot in slots])
        return Batch(torch.tensor(list(slots)), batch.fields)

    def state_dict(self) -> State:
        return {"digest": self.digest}

    def load_state_dict(self, state: State) -> None:
        if state["digest"] != self.digest:
            raise DataError("other rows")


class Rows(SourceSettings):
    parts: tuple[int, ...] = (24, 24)
    held: tuple[int, ...] = (6,)
    seed: int = 0
    note: str = Field(default="")

    def build(self, context: SourceContext) -> RowPool:
        training = context.split == "train"
        return RowPool(self.parts if training else self.held, self.seed if training else 99, context.batch_size)


ROWS = {"use": f"{Rows.__module__}:Rows"}


def tiny_model(seed: int = 0, **more: Any) -> Any:
    settings: dict[str, Any] = {"vocab_size": V, "hidden_size": 16, "layers": 1, "heads": 2, "mlp_size": 24} | more
    return DecoderSettings(**settings).build(ModelContext(seed, None))


def make_run(source: Any, objective: Any = None, *, model: Any = None, steps: int = 12, **pace: Any) -> Run:
    torch.set_num_threads(1)
    model = model or tiny_model()
    return Run(
        source=source,
        model=model,
        objective=objective or NextToken().build(),
        optimizer=AdamW(lr=1e-2).build(model, 40),
        pace=Pace(**{"steps": steps, "micro_batch_size": 0, "clip_norm": 1.0} | pace),
        seed=0,
        device=torch.device("cpu"),
        autocast=nullcontext,
    )


def make_look(pool: Any, count: int, *, target: Any = None, run: Run | None = None, **more: Any) -> Look:
    run = run or make_run(pool)
    view = dataclasses.replace(run._view(), step=more.pop("step", 0))
    return Look(
        view=view, pool=pool, find_target=lambda: target, count=count, **{"update": 1, "updates": 4, "seed": 0} | more
    )


def copied(tree: Any) -> Any:
    if isinstance(tree, Tensor):
        return tree.detach().clone()
    if isinstance(tree, dict):
        return {key: copied(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [copied(value) for value in tree]
    return tree


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return set(a) == set(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)


def check_resume(build: Callable[[], Run], steps: int, cuts: Sequence[int]) -> None:
    """A run cut after each of some steps, saved and continued elsewhere, ends with the same bits."""
    whole = build()
    whole.pace = dataclasses.replace(whole.pace, steps=steps)
    saved = {}
    for step in range(1, steps + 1):
        whole.pace = dataclasses.replace(whole.pace, steps=step)
        whole.train()
        if step in cuts:
            saved[step] = copied(whole.state_dict())
    for _cut, state in saved.items():
        other = build()
        other.pace = dataclasses.replace(other.pace, steps=steps)
        other.load_state_dict(copied(state))
        other.train()
        assert same(whole.state_dict(), other.state_dict())


@pytest.fixture
def kit() -> Any:
    """Everything above, for tests that cannot import each other."""
    import sys

    return sys.modules[__name__]


@pytest.fixture
def in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path
