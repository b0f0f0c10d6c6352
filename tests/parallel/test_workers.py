"""Data parallelism under ZeRO-1: many workers against one, to the bit in exact mode."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from forked import run_ranks

from resilin.keys import Keys
from resilin.layout.dealing import VIRTUAL_SHARDS, deal, redeal
from resilin.models.decoder_settings import DecoderSettings
from resilin.models.settings import ModelContext
from resilin.nouns import Batch
from resilin.objective.next_token import NextToken
from resilin.optim.adamw import AdamW
from resilin.optim.muon import Muon
from resilin.optim.settings import OptimizerSettings
from resilin.optim.sgd import SGD
from resilin.parallel.assemble import assemble
from resilin.parallel.blueprint import Blueprint
from resilin.parallel.degrees import Degrees
from resilin.parallel.step import OneProcess
from resilin.parallel.whole_model import WholeModel
from resilin.parallel.world import World

SIZES = DecoderSettings(
    vocab_size=61, hidden_size=48, layers=2, heads=3, kv_heads=1, mlp_size=80, dropout=0.1, tie_embeddings=True
)
SEED, T = 7, 12
OPTIMIZERS: dict[str, OptimizerSettings] = {
    "adamw": AdamW(lr=1e-2),
    "sgd": SGD(lr=0.1, momentum=0.9),
    "muon": Muon(lr=1e-2),
}


def fetch(step: int, slots: Sequence[int], count: int) -> Batch:
    """Random tokens; a third of the labels are masked, unevenly over slots."""
    rows = []
    for slot in slots:
        draw = torch.Generator().manual_seed(1000 * step + slot)
        tokens = torch.randint(0, 61, (T + 1,), generator=draw)
        labels = tokens[1:].clone()
        labels[torch.rand(T, generator=draw) < 0.6 * slot / count] = -100
        rows.append((tokens[:-1], labels))
    tokens = torch.stack([t for t, _ in rows]) if rows else torch.zeros(0, T, dtype=torch.int64)
    labels = torch.stack([y for _, y in rows]) if rows else torch.zeros(0, T, dtype=torch.int64)
    return Batch(torch.tensor(list(slots), dtype=torch.int64), {"tokens": tokens, "labels": labels})


def alone(optimizer: str, steps: int, count: int, micro: int, clip: float):
    """The same steps by one process: losses, norms, parameters and moments."""
    torch.set_num_threads(1)
    model = SIZES.build(ModelContext(SEED, 61))
    made = OPTIMIZERS[optimizer].build(model, steps)
    cpu = torch.device("cpu")
    engine = OneProcess(model, NextToken().build(), micro_batch_size=micro, clip_norm=clip, device=cpu, autocast=_plain)
    told = []
    for step in range(steps):
        batch = fetch(step, range(count), count)
        made.zero_grad()
        found = engine.gradient(batch, Keys(SEED, step, batch.slots_B), count)
        made.step(step)
        told.append((found.loss, found.norm, found.units, found.logs))
    return told, model, made.state_dict()["parameters"]


def _plain():
    from contextlib import nullcontext

    return nullcontext()


def together(rank, degrees, optimizer, steps, count, micro, clip, exact, table=None):
    world = World(degrees, rank)
    model = SIZES.build(ModelContext(SEED, 61))
    settings, objective = OPTIMIZERS[optimizer], NextToken().build()
    cpu = torch.device("cpu")
    made = assemble(
        world,
        WholeModel(model, objective, model, device=cpu, autocast=_plain),
        replace(Blueprint.uncut(model, degrees, settings.keeps_whole(model)), virtual=table and {"dense": table}),
        lambda owned: settings.build_owned(model, steps, owned),
        objective=objective,
        micro_batch_size=micro,
        clip_norm=clip,
        exact=exact,
        device=cpu,
        autocast=_plain,
    )
    told = []
    for step in range(steps):
        batch = fetch(step, made.engine.slots(count, step), count)
        made.optimizer.zero_grad()
        found = made.engine.gradient(batch, Keys(SEED, step, batch.slots_B), count)
        made.optimizer.step(step)
        told.append((found.loss, found.norm, found.units, found.logs))
    states = made.optimizer.state_dict()["parameters"]
    (reduction,) = made.reductions.values()
    runs = {
        name: [(run.begin, run.end) for run in reduction.ownership.runs_of(number, rank)]
        for number, name in enumerate(reduction.names)
    }
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    return told, weights, states, runs


def whole_states(results, sizes):
    """The moments of all elements, put together from the owners'."""
    found: dict[str, dict[str, torch.Tensor]] = {}
    for _, _, states, runs in results:
        for name, moments in states.items():
            for key, tensor in moments.items():
                whole = found.setdefault(name, {}).setdefault(
                    key, torch.full((sizes[name],), torch.nan) if tensor.dim() else tensor
                )
                if tensor.dim():
                    flat, at = tensor.reshape(-1), 0
                    for begin, end in runs[name]:
                        whole[begin:end] = flat[at : at + end - begin]
                        at += end - begin
                    assert at == flat.numel()
    return found


@pytest.mark.parametrize("optimizer", sorted(OPTIMIZERS))
@pytest.mark.parametrize(("workers", "count", "micro"), [(2, 8, 2), (3, 8, 1), (4, 6, 1), (3, 7, 3), (4, 3, 1)])
def test_exact_mode_gives_the_bits_of_one_process(optimizer, workers, count, micro):
    steps, clip = 3, 0.5
    told, model, states = alone(optimizer, steps, count, micro, clip)
    results = run_ranks(workers, together, Degrees(data=workers), optimizer, steps, count, micro, clip, True)
    assert any(norm > clip for _, norm, *_ in told)  # clipping is part of what is compared
    for mine, weights, _, _ in results:
        assert [(loss, norm, units) for loss, norm, units, _ in mine] == [(a, b, c) for a, b, c, _ in told]
        for (*_, logs), (*_, expected) in zip(mine, told, strict=True):
            assert logs == pytest.approx(expected, rel=1e-6)
        for name, p in model.named_parameters():
            assert torch.equal(weights[name], p.detach()), name
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    found = whole_states(results, sizes)
    assert found.keys() == states.keys()
    for name, moments in states.items():
        for key, tensor in moments.items():
            assert torch.equal(found[name][key], tensor.reshape(-1) if tensor.dim() else tensor), (name, key)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_shards_that_changed_hands_give_the_same_bits(optimizer):
    """After owners came and went a worker has several runs of a parameter: no order and no update changes."""
    table = redeal(redeal(redeal(deal(VIRTUAL_SHARDS, 4), 2), 5), 3)
    runs = [sum(1 for _ in group) for owner, group in itertools.groupby(table) if owner == 0]
    assert len(runs) > 1
    told, model, states = alone(optimizer, 3, 8, 2, 0.5)
    results = run_ranks(3, together, Degrees(data=3), optimizer, 3, 8, 2, 0.5, True, table)
    for mine, weights, _, _ in results:
        assert [(loss, norm) for loss, norm, _, _ in mine] == [(a, b) for a, b, _, _ in told]
        for name, p in model.named_parameters():
            assert torch.equal(weights[name], p.detach()), name
    found = whole_states(results, {name: p.numel() for name, p in model.named_parameters()})
    for name, moments in states.items():
        for key, tensor in moments.items():
            assert torch.equal(found[name][key], tensor.reshape(-1) if tensor.dim() else tensor), (name, key)


@pytest.mark.parametrize(("workers", "count", "micro"), [(2, 8, 2), (3, 7, 1)])
def test_fast_mode_agrees_to_rounding(workers, count, micro):
    told, model, _ = alone("sgd", 3, count, micro, 0.0)
    results = run_ranks(workers, together, Degrees(data=workers), "sgd", 3, count, micro, 0.0, False)
    for mine, weights, _, _ in results:
        for (loss, norm, units, _), (expected, its_norm, its_units, _) in zip(mine, told, strict=True):
            assert (loss, norm, units) == pytest.approx((expected, its_norm, its_units), rel=1e-5)
        for name, p in model.named_parameters():
            torch.testing.assert_close(weights[name], p.detach(), rtol=1e-4, atol=1e-6)


def broken(rank, degrees, count):
    """A step in which the loss of slot 5 is infinite."""
    world = World(degrees, rank)
    model = SIZES.build(ModelContext(SEED, 61))
    settings, objective = OPTIMIZERS["adamw"], NextToken().build()
    cpu = torch.device("cpu")
    made = assemble(
        world,
        WholeModel(model, objective, model, device=cpu, autocast=_plain),
        Blueprint.uncut(model, degrees),
        lambda owned: settings.build_owned(model, 1, owned),
        objective=objective,
        micro_batch_size=2,
        clip_norm=1.0,
        exact=True,
        device=cpu,
        autocast=_plain,
        model=model,
    )
    plain = fetch(0, made.engine.slots(count, 0), count)
    weights = torch.ones(len(plain), T)
    weights[plain.slots_B == 5] = float("inf")
    batch = Batch(plain.slots_B, {**plain.fields, "weights": weights})
    keys = Keys(SEED, 0, batch.slots_B)
    found = made.engine.gradient(batch, keys, count)
    made.optimizer.zero_grad()
    return found.finite, made.engine.non_finite(batch, keys), made.engine.agreed(rank * 7)


def test_all_workers_learn_which_slot_is_not_finite_and_agree_on_the_largest():
    for finite, slots, agreed in run_ranks(3, broken, Degrees(data=3), 8):
        assert not finite
        assert slots == [5]
        assert agreed == 14
