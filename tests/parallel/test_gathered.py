"""How often FSDP sends weights and gradients, and that nothing stale is computed with."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest.mock import patch

import pytest
import torch
from forked import run_ranks
from torch.distributed.fsdp._fully_shard import _fsdp_param_group as fsdp

from resilin.keys import Keys
from resilin.models.decoder_settings import DecoderSettings
from resilin.models.settings import ModelContext
from resilin.nouns import Batch
from resilin.objective.next_token import NextToken
from resilin.optim.sgd import SGD
from resilin.parallel.assemble import assemble
from resilin.parallel.part import divide_decoder
from resilin.parallel.settings import ParallelSettings
from resilin.parallel.step import Engine, OneProcess
from resilin.parallel.world import World

SIZES = DecoderSettings(vocab_size=40, hidden_size=32, layers=4, heads=2, mlp_size=48, tie_embeddings=True)
T, SEED, SLOTS, STEPS = 8, 3, 8, 3
CPU = torch.device("cpu")
SGD_FAST = SGD(lr=1.0, momentum=0.9)


class Text:
    """Random tokens, of which a step's slots and a held-out batch's are different ones."""

    def slots(self, index: int) -> int:
        return 2

    def fetch(self, index: int, slots: Iterable[int]) -> Batch:
        numbers = list(slots)
        rows = [
            torch.randint(0, 40, (T + 1,), generator=torch.Generator().manual_seed(99 * index + s)) for s in numbers
        ]
        tokens = torch.stack(rows)
        return Batch(torch.tensor(numbers), {"tokens": tokens[:, :-1], "labels": tokens[:, 1:]})


def trained(engine: Engine, optimizer: Any, watch: Any = nullcontext) -> list[float]:
    """The losses of steps, and between them of held-out batches."""
    told = []
    for step in range(STEPS):
        with watch():
            told.append(engine.evaluate(Text(), [100, 101]).loss)  # type: ignore[arg-type]
        slots = list(engine.slots(SLOTS, step))
        batch = Text().fetch(step, slots)
        optimizer.zero_grad()
        with watch():
            told.append(engine.gradient(batch, Keys(SEED, step, batch.slots_B), SLOTS).loss)
        optimizer.step(step)
    return told


Seen = tuple[list[float], list[tuple[Counter[str], Counter[str]]]]
"""Losses, and of every evaluation and step how often each part was gathered and its gradients were summed."""


def worker(rank: int, layouts: list[dict[str, Any]]) -> list[Seen]:
    torch.set_num_threads(1)
    return [seen(rank, layout) for layout in layouts]


def seen(rank: int, parallel: dict[str, Any]) -> Seen:
    settings = ParallelSettings(**parallel)
    world = World(settings.degrees(4), rank)
    part = divide_decoder(
        settings,
        world,
        SIZES.build(ModelContext(SEED)),
        NextToken().build(),
        tokens=T,
        keep_whole=set(),
        device=CPU,
        autocast=nullcontext,
    )
    made = assemble(
        world,
        part.passes,
        part.blueprint,
        lambda owned: SGD_FAST.build_owned(SIZES.outline(ModelContext(SEED)), STEPS, owned),
        objective=NextToken().build(),
        micro_batch_size=1,
        clip_norm=0.0,
        exact=False,
        device=CPU,
        autocast=nullcontext,
        facts=part.facts,
    )
    counts: list[tuple[Counter[str], Counter[str]]] = []

    def counted(kind: int, function: Any) -> Any:
        def wrapped(parameters: Any, *rest: Any) -> Any:
            counts[-1][kind][str(parameters[0]._param_fqn)] += 1
            return function(parameters, *rest)

        return wrapped

    @contextmanager
    def watch() -> Iterator[None]:
        counts.append((Counter(), Counter()))
        with (
            patch.object(fsdp, "foreach_all_gather", counted(0, fsdp.foreach_all_gather)),
            patch.object(fsdp, "foreach_reduce", counted(1, fsdp.foreach_reduce)),
        ):
            yield

    return trained(made.engine, made.optimizer, watch), counts


LAYOUTS = [
    {"pipeline": 2, "data": 2},
    {"pipeline": 2, "data": 2, "schedule": "gpipe"},
    {"pipeline": 2, "data": 2, "schedule": "interleaved", "chunks": 2},
    {"pipeline": 2, "data": 2, "schedule": "zb-h1"},
    {"pipeline": 2, "data": 2, "schedule": "zb-interleaved", "chunks": 2},
    {"pipeline": 2, "data": 2, "gather": "block"},
    {"data": 4, "gather": "step"},
    {"data": 4},
]


def test_weights_are_sent_as_often_as_the_setting_says_and_none_are_stale() -> None:
    torch.set_num_threads(1)
    model = SIZES.build(ModelContext(SEED))
    alone = OneProcess(model, NextToken().build(), micro_batch_size=1, clip_norm=0.0, device=CPU, autocast=nullcontext)
    expected = trained(alone, SGD_FAST.build(model, STEPS))
    for found in run_ranks(4, worker, [{**layout, "sharding": "fsdp"} for layout in LAYOUTS], timeout=240):
        for layout, (told, counts) in zip(LAYOUTS, found, strict=True):
            assert told == pytest.approx(expected, rel=1e-5), layout
            check_counts(layout, counts)


def check_counts(layout: dict[str, Any], counts: list[tuple[Counter[str], Counter[str]]]) -> None:
    by_step = layout.get("gather", "step" if "pipeline" in layout else "block") == "step"
    micros = SLOTS // layout["data"]
    parts = counts[1][0].keys()  # the blocks of this worker, and of each stage what is not in one
    assert len(parts) in ((3, 4) if "pipeline" in layout else (5,))
    for number, (gathered, reduced) in enumerate(counts):
        evaluation = number % 2 == 0
        assert reduced.keys() == (set() if evaluation else parts), layout
        for name in parts:
            if by_step:
                assert gathered[name] == 1, (layout, name)
                assert evaluation or reduced[name] == 1, (layout, name)
            elif name.startswith("blocks.") and not evaluation:
                assert gathered[name] == 2 * micros, (layout, name)
                assert reduced[name] == micros, (layout, name)
