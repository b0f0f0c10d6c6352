"""Steps of a language model over drawn rows, and that nobody can tell how they were split."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from forked import run_ranks
from torch import nn

from resilin.keys import Keys
from resilin.models.settings import ModelContext, ModelSettings
from resilin.nouns import Batch, Objective
from resilin.optim.adamw import AdamW
from resilin.parallel.assemble import assemble
from resilin.parallel.blueprint import Blueprint
from resilin.parallel.degrees import Degrees
from resilin.parallel.step import OneProcess, gradient_of_step
from resilin.parallel.whole_model import WholeModel
from resilin.parallel.world import World

VOCABULARY, T, SEED = 37, 8, 7
CPU = torch.device("cpu")


def batch_of(slots, step=0) -> Batch:
    """(len(slots), T) tokens and labels, a function of step and slot."""
    drawn = [torch.Generator().manual_seed(1000 * step + slot) for slot in slots]
    rows = [torch.randint(0, VOCABULARY, (T + 1,), generator=one) for one in drawn]
    found = torch.stack(rows) if rows else torch.zeros(0, T + 1, dtype=torch.int64)
    return Batch(torch.tensor(list(slots), dtype=torch.int64), {"tokens": found[:, :-1], "labels": found[:, 1:]})


def keys_at(step: int, count: int = 4) -> Keys:
    return Keys(SEED, step, torch.arange(count))


def check_micro_batches(make: Callable[[], nn.Module], objective: Objective) -> None:
    """Loss and gradients of a step are the same in one, two and four micro-batches."""
    found = []
    for micro in (4, 2, 1):
        model = make()
        told = gradient_of_step(
            model, objective, batch_of(range(4)), keys_at(3), micro_batch_size=micro, clip_norm=0.0, device=CPU,
            autocast=nullcontext,
        )  # fmt: skip
        found.append((told, [p.grad for p in model.parameters()]))
    for told, grads in found[1:]:
        assert told.loss == pytest.approx(found[0][0].loss)
        for mine, theirs in zip(grads, found[0][1], strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-9)


def _steps_of(model: nn.Module, made: Any, engine: Any, steps: int) -> tuple[list, dict[str, torch.Tensor]]:
    told = []
    for step in range(steps):
        batch = batch_of(engine.slots(8, step), step)
        made.zero_grad()
        gradient = engine.gradient(batch, Keys(SEED, step, batch.slots_B), 8)
        made.step(step)
        told.append((gradient.loss, gradient.norm, sorted(gradient.logs)))
    return told, {name: p.detach().clone() for name, p in model.named_parameters()}


def _together(rank: int, settings: ModelSettings, chosen: Any, steps: int) -> tuple[list, dict[str, torch.Tensor]]:
    torch.set_num_threads(1)
    world, degrees, optimizer = World(Degrees(data=2), rank), Degrees(data=2), AdamW(lr=1e-2)
    model, objective = settings.build(ModelContext(SEED, VOCABULARY)), chosen.build()
    made = assemble(
        world,
        WholeModel(model, objective, model, device=CPU, autocast=nullcontext),
        Blueprint.uncut(model, degrees, optimizer.keeps_whole(model)),
        lambda owned: optimizer.build_owned(model, steps, owned),
        objective=objective, micro_batch_size=2, clip_norm=0.5, exact=True, device=CPU, autocast=nullcontext,
    )  # fmt: skip
    return _steps_of(model, made.optimizer, made.engine, steps)


def check_two_workers(settings: ModelSettings, chosen: Any, steps: int) -> None:
    """Losses, norms and weights of two data-parallel workers have the bits of one process.

    Args:
        settings: of the model.
        chosen: settings of the objective.
        steps: that are taken.
    """
    model, objective = settings.build(ModelContext(SEED, VOCABULARY)), chosen.build()
    engine = OneProcess(model, objective, micro_batch_size=2, clip_norm=0.5, device=CPU, autocast=nullcontext)
    told, weights = _steps_of(model, AdamW(lr=1e-2).build(model, steps), engine, steps)
    for theirs, its_weights in run_ranks(2, _together, settings, chosen, steps):
        assert theirs == told
        assert all(torch.equal(its_weights[name], tensor) for name, tensor in weights.items())
