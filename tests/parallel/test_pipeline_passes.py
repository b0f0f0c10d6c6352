"""The executor of pipelines: stages with unlike numbers of replicas, orders of one's own, what it measures."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.distributed as dist
from forked import run_ranks
from listed_orders import Listed

from resilin.keys import Keys
from resilin.models.decoder_settings import DecoderSettings
from resilin.models.settings import ModelContext
from resilin.nouns import Batch, Loss
from resilin.objective.next_token import NextToken
from resilin.parallel.group import Group
from resilin.parallel.pipeline.line_orders import LineOrders
from resilin.parallel.pipeline.members import level, lower_members
from resilin.parallel.pipeline.messages import lower
from resilin.parallel.pipeline.passes import PipelinePasses
from resilin.parallel.pipeline.schedule import Schedule
from resilin.parallel.pipeline.slots import SlotTable, in_blocks
from resilin.parallel.pipeline.split import Split
from resilin.parallel.pipeline.stage import Stage, cut
from resilin.parallel.pipeline.timeline import Timeline

SIZES = DecoderSettings(vocab_size=40, hidden_size=32, layers=3, heads=2, mlp_size=48, dropout=0.1)
T, SEED, SLOTS = 10, 5, 8
CPU = torch.device("cpu")


def rows_of(slots: list[int]) -> tuple[Batch, Keys]:
    tokens, labels = [], []
    for slot in slots:
        draw = torch.Generator().manual_seed(slot)
        row = torch.randint(0, 40, (T + 1,), generator=draw)
        tokens.append(row[:-1])
        labels.append(row[1:])
    batch = Batch(torch.tensor(slots), {"tokens": torch.stack(tokens), "labels": torch.stack(labels)})
    return batch, Keys(SEED, 0, batch.slots_B)


def reference() -> tuple[float, dict[str, torch.Tensor]]:
    torch.set_num_threads(1)
    model = SIZES.build(ModelContext(SEED))
    batch, keys = rows_of(list(range(SLOTS)))
    loss: Loss = NextToken().build()(model, batch, keys)
    loss.sum.backward()
    return float(loss.sum.detach()), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


TABLES = {
    "two and one": (in_blocks(SLOTS, 2, 2), in_blocks(SLOTS, 1, 2)),
    "one and two": (in_blocks(SLOTS, 1, 2), in_blocks(SLOTS, 2, 2)),
    # Micro-batches that do not match: a message's rows come from two senders.
    "uneven": (SlotTable.of(SLOTS, {0: [[(0, 3)], [(3, 5)]], 1: [[(5, 8)]]}), in_blocks(SLOTS, 1, 4)),
    "after a loss": (in_blocks(SLOTS, 2, 2), in_blocks(SLOTS, 2, 2).without(1)),
}


def member(rank: int, tables: tuple[SlotTable, SlotTable]) -> dict[str, Any] | None:
    schedule = level(tables)
    if rank >= len(schedule.members):
        return None
    ops, mine = lower_members(schedule), schedule.members[rank]
    module = cut(SIZES.build(ModelContext(SEED)), Split((0, 1, 3)), [mine.rank])[0]
    passes = PipelinePasses(
        [Stage(mine.rank, module)],
        Listed(ops[rank], 2),
        NextToken().build(),
        peers=range(dist.get_world_size()),
        number=rank,
        group=Group.of(),
        device=CPU,
        autocast=nullcontext,
    )
    micros = [
        rows_of([slot for start, end in micro for slot in range(start, end)])
        for micro in tables[mine.rank].micros(mine.replica)
    ]
    done: list[tuple[int, int]] = []
    losses: dict[int, Loss] = {}
    passes.train(micros, lambda *collected: done.append(collected), losses)
    assert sorted(done) == [(0, micro) for micro in range(len(micros))]
    grads = {name: p.grad for name, p in module.named_parameters()}
    return {"losses": [float(loss.sum) for loss in losses.values()], "grads": grads}


@pytest.mark.parametrize("name", TABLES)
def test_stages_may_have_unlike_numbers_of_replicas(name):
    total, expected = reference()
    tables = TABLES[name]
    count = sum(len(table.replicas) for table in tables)
    results = [found for found in run_ranks(count, member, tables) if found is not None]
    assert sum(loss for found in results for loss in found["losses"]) == pytest.approx(total, rel=1e-6)
    summed: dict[str, torch.Tensor] = {}
    for found in results:
        for key, grad in found["grads"].items():
            summed[key] = summed[key] + grad if key in summed else grad
    assert summed.keys() == expected.keys()
    for key, grad in expected.items():
        torch.testing.assert_close(summed[key], grad, rtol=1e-4, atol=1e-6)


def measured(rank: int, text: str) -> Any:
    """Through a schedule given as text; what was measured, and the most that was kept between passes."""
    schedule = Schedule.parse(text)
    ops = lower(schedule)[rank]
    module = cut(SIZES.build(ModelContext(SEED)), Split((0, 1, 3)), [rank])[0]
    passes = PipelinePasses(
        [Stage(rank, module)],
        LineOrders(lambda _: ops, schedule.rank_of, rank),
        NextToken().build(),
        peers=(0, 1),
        number=rank,
        group=Group.of(),
        device=CPU,
        autocast=nullcontext,
    )
    passes.measure = True
    passes.train([rows_of([micro]) for micro in range(schedule.micros)], lambda chunk, micro: None, {})
    evaluated = passes.evaluate([rows_of([0])[0], rows_of([1, 2])[0]], 2)
    return passes.records, passes.core_seconds, [float(loss.sum) for loss in evaluated]


def test_an_order_of_ones_own_runs_as_it_says_and_is_measured():
    text = "0F0,0F1,0B0,0F2,0B1,0B2\n1F0,1B0,1F1,1B1,1F2,1B2\n"
    schedule = Schedule.parse(text)
    (first, core, nothing), (second, _, losses) = run_ranks(2, measured, text)
    timeline = Timeline.of([*first, *second])
    for rank, records in enumerate((first, second)):
        assert [record.action for record in records] == list(schedule.actions[rank])
    assert 0 < core < timeline.makespan  # the time of its thread; waiting for the other rank is none
    at = {(record.action, record.rank): record for record in timeline.records}
    for record in timeline.records:  # no forward begins before the one of the stage before it has ended
        if record.action.kind.value == "F" and record.action.stage:
            before = next(r for (a, _), r in at.items() if a.kind is record.action.kind
                          and a.micro == record.action.micro and a.stage == record.action.stage - 1)  # fmt: skip
            assert before.end <= record.start + 1e-3
    model, objective = SIZES.build(ModelContext(SEED)), NextToken().build()
    assert nothing == []
    for loss, slots in zip(losses, ([0], [1, 2]), strict=True):
        assert loss == pytest.approx(float(objective(model, rows_of(slots)[0], None).sum), rel=1e-6)


def test_a_pipeline_says_what_it_cannot_do():
    module = cut(SIZES.build(ModelContext(SEED)), Split((0, 1, 3)), [1])[0]
    stage = Stage(1, module)
    objective = NextToken().build()
    batch, keys = rows_of([0])
    with pytest.raises(ValueError, match="more than once for a micro-batch"):
        stage.forward(None, lambda: objective(module, batch, keys))
    with pytest.raises(ValueError, match="did not call its model"):
        stage.shape(lambda: None)
    with pytest.raises(ValueError, match="has no block"):
        cut(SIZES.build(ModelContext(SEED)), Split((0, 3, 3)), [1])
    with pytest.raises(ValueError, match="has 0 of them"):
        cut(torch.nn.Linear(2, 2), Split((0, 1)), [0])
