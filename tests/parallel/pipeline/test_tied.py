"""One sum for a weight that is the embedding and the head: the additions of autograd in one process."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from forked import run_ranks
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from resilin.keys import Keys
from resilin.models.decoder_settings import DecoderSettings
from resilin.models.settings import ModelContext
from resilin.nouns import Batch
from resilin.objective.next_token import NextToken
from resilin.parallel.canonical import GradientSum
from resilin.parallel.pipeline import passes as passes_module
from resilin.parallel.pipeline.build import build
from resilin.parallel.pipeline.members import level, lower_members
from resilin.parallel.pipeline.messages import lower
from resilin.parallel.pipeline.passes import PipelinePasses
from resilin.parallel.pipeline.slots import SlotTable, in_blocks
from resilin.parallel.pipeline.split import Split
from resilin.parallel.pipeline.stage import Stage, cut
from resilin.parallel.pipeline.tied import TiedSum, heads_kept


@given(st.integers(1, 6), st.sampled_from([torch.float32, torch.bfloat16]), st.data())
@settings(max_examples=40, deadline=None)
def test_the_sum_is_that_of_autograd_however_late_the_embedding_comes(
    micros: int, dtype: torch.dtype, data: st.DataObject
) -> None:
    draw = torch.Generator().manual_seed(micros)
    V, D = 7, 5
    start_VD = torch.randn(V, D, generator=draw).to(dtype)
    tokens = [torch.randint(0, V, (2, 4), generator=draw) for _ in range(micros)]
    gains = [torch.randn(2, 4, V, generator=draw).to(dtype) for _ in range(micros)]

    whole = nn.Parameter(start_VD.clone())
    alone = GradientSum([whole], micros)
    for ids_BT, gain_BTV in zip(tokens, gains, strict=True):
        (F.linear(F.embedding(ids_BT, whole).tanh(), whole) * gain_BTV).sum().backward()
        alone.collect()
    (expected_VD,) = alone.finish()

    weight = nn.Parameter(start_VD.clone())
    total = GradientSum([weight], micros)
    tied = TiedSum(weight, total.collect)
    outputs: list[torch.Tensor] = []
    for micro, (ids_BT, gain_BTV) in enumerate(zip(tokens, gains, strict=True)):
        x_BTD = F.embedding(ids_BT, weight.detach()).requires_grad_()
        with tied.head(micro, ids_BT):
            (F.linear(x_BTD.tanh(), weight) * gain_BTV).sum().backward()
        outputs.append(x_BTD.grad)  # type: ignore[arg-type]
        for _ in range(data.draw(st.integers(0, micro + 1 - tied.next))):
            tied.embedding(outputs[tied.next])
    while tied.next < micros:
        tied.embedding(outputs[tied.next])
    (found_VD,) = total.finish()
    assert torch.equal(found_VD, expected_VD)


SIZES = DecoderSettings(vocab_size=40, hidden_size=32, layers=4, heads=2, mlp_size=48, dropout=0.1, tie_embeddings=True)
T, SEED = 10, 5


def rows_of(slots: list[int]) -> tuple[Batch, Keys]:
    rows = []
    for slot in slots:
        rows.append(torch.randint(0, 40, (T + 1,), generator=torch.Generator().manual_seed(slot)))
    tokens = torch.stack(rows)
    batch = Batch(torch.tensor(slots), {"tokens": tokens[:, :-1], "labels": tokens[:, 1:]})
    return batch, Keys(SEED, 0, batch.slots_B)


def stage_passes(stages: list[int], split: Split, rank: int, ops: Any, rank_of: Any) -> PipelinePasses:
    modules = cut(SIZES.build(ModelContext(SEED)), split, stages)
    weights = [p for module in modules for name, p in module.named_parameters() if name == "embed.weight"]
    return PipelinePasses(
        [Stage(number, module) for number, module in zip(stages, modules, strict=True)],
        lambda _: ops,
        rank_of,
        NextToken().build(),
        peers=range(dist.get_world_size()),
        number=rank,
        process_group=dist.group.WORLD,
        device=torch.device("cpu"),
        autocast=nullcontext,
        tied=weights[0] if weights else None,
    )


def most_heads(rank: int, names: list[tuple[str, int]], micros: int) -> list[tuple[int, int]]:
    """Of each schedule how many gradients of the head were kept at the last stage, and how many were foretold."""
    torch.set_num_threads(1)
    found = []
    for name, stages in names:
        most = 0

        class Watched(TiedSum):
            def embedding(self, grad_BTD: torch.Tensor) -> None:
                nonlocal most
                most = max(most, len(self._heads))
                super().embedding(grad_BTD)

        passes_module.TiedSum = Watched  # type: ignore[misc]
        schedule = build(name, stages, 2, micros)
        ops = lower(schedule, tied=True)[rank]
        split = Split(tuple(range(0, 5, 4 // stages)))
        passes = stage_passes(list(schedule.stages_of(rank)), split, rank, ops, schedule.rank_of)
        told: list[int] = []
        passes.train([rows_of([micro]) for micro in range(micros)], told.append)
        assert [told.count(part) for part in range(len(passes.collected))] == [micros] * len(passes.collected)
        if schedule.rank_of[-1] == rank:
            found.append((most, heads_kept(ops, stages - 1)))
    return found


def test_as_many_heads_are_kept_as_was_foretold() -> None:
    names = [("gpipe", 2), ("1f1b", 2), ("interleaved", 4), ("zb-h1", 2), ("zb-v", 4)]
    found = [each for told in run_ranks(2, most_heads, names, 6) for each in told]
    assert len(found) == len(names)
    for kept, foretold in found:
        assert 1 <= kept == foretold < 6


TABLES = {
    "two and one": (in_blocks(8, 2, 2), in_blocks(8, 1, 2)),
    "uneven": (SlotTable.of(8, {0: [[(0, 3)], [(3, 5)]], 1: [[(5, 8)]]}), in_blocks(8, 1, 4)),
    "after a loss": (in_blocks(8, 2, 2), in_blocks(8, 2, 2).without(1)),
}


def member(rank: int, tables: tuple[SlotTable, SlotTable]) -> torch.Tensor | None:
    """The tied weight's gradient, at members of the last stage."""
    torch.set_num_threads(1)
    schedule = level(tables)
    if rank >= len(schedule.members):
        return None
    mine = schedule.members[rank]
    passes = stage_passes([mine.rank], Split((0, 1, 4)), rank, lower_members(schedule, tied=True)[rank], (0, 1))
    micros = tables[mine.rank].micros(mine.replica)
    passes.train([rows_of([s for a, b in micro for s in range(a, b)]) for micro in micros], lambda _: None)
    weight = passes.collected[-1][0] if mine.rank else next(passes.chunks[0].parameters())
    assert (weight.grad is None) == (mine.rank == 0)
    return weight.grad


@pytest.mark.parametrize("name", TABLES)
def test_stages_with_unlike_replicas_send_rows_to_whoever_has_their_head(name: str) -> None:
    model = SIZES.build(ModelContext(SEED))
    batch, keys = rows_of(list(range(8)))
    NextToken().build()(model, batch, keys).sum.backward()
    count = sum(len(table.replicas) for table in TABLES[name])
    found = [grad for grad in run_ranks(count, member, TABLES[name]) if grad is not None]
    torch.testing.assert_close(torch.stack(found).sum(0), model.embed.weight.grad, rtol=1e-4, atol=1e-6)
