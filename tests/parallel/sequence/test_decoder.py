from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from forked import run_ranks

from resilin.keys import Keys
from resilin.models.decoder import Decoder
from resilin.models.decoder_settings import DecoderSettings, MoESettings
from resilin.models.rope_scaling import DynamicScaling
from resilin.nouns import Batch
from resilin.objective.next_token import NextToken
from resilin.parallel.errors import ParallelError
from resilin.parallel.group import Group
from resilin.parallel.sequence.part import ContextKind
from resilin.parallel.sequence.ring import ring
from resilin.parallel.sequence.shard import shard_sequence
from resilin.parallel.sequence.ulysses import ulysses

TOKENS = 17  # divides by no number of ranks
SMALL: dict[str, Any] = {"vocab_size": 40, "hidden_size": 24, "layers": 2, "heads": 6, "kv_heads": 2, "init_std": 0.2}
KINDS: dict[str, DecoderSettings] = {
    "plain": DecoderSettings(**SMALL),
    "dropout": DecoderSettings(**SMALL, dropout=0.3),
    "window": DecoderSettings(**SMALL, sliding_window=5, window_layers=(1,)),
    "experts": DecoderSettings(**SMALL, moe=MoESettings(experts=4, expert_size=16, shared_size=8, dense_layers=(0,))),
    "norms": DecoderSettings(**SMALL, qk_norm="rms", qkv_bias=True, tie_embeddings=True, recompute="block"),
    "selective": DecoderSettings(**SMALL, recompute="selective", attention_backend="eager"),
    "stretched": DecoderSettings(**SMALL, max_positions=6, rope_scaling=DynamicScaling(factor=4.0)),
}


def batch_of(tokens: int, *, packed: bool, rows: int = 2) -> Batch:
    """Rows with some masked labels and unequal weights; packed: of documents, one row ending in padding."""
    generator = torch.Generator().manual_seed(tokens)
    ids = torch.randint(0, 40, (rows, tokens + 1), generator=generator)
    labels = ids[:, 1:].clone()
    labels[0, :3] = -100
    fields = {"tokens": ids[:, :-1].clone(), "labels": labels, "weights": torch.rand(rows, tokens, generator=generator)}
    if packed:
        documents = torch.zeros(rows, tokens, dtype=torch.int32)
        documents[0, tokens // 3 :] = 1
        documents[1, -2:] = -1
        fields["documents"], fields["labels"][1, -3:] = documents, -100
        fields["positions"] = torch.arange(tokens).repeat(rows, 1)
        fields["positions"][0, tokens // 3 :] -= tokens // 3
    return Batch(torch.arange(rows), fields)


def loss_and_gradients(model: Decoder, batch: Batch, keys: Keys) -> tuple[float, float, dict[str, torch.Tensor]]:
    loss = NextToken(z_loss=1e-3).build()(model, batch, keys)
    loss.sum.backward()
    return (
        float(loss.sum.detach()),
        float(loss.units),
        {n: p.grad for n, p in model.named_parameters() if p.grad is not None},
    )


DIVIDE = {"ulysses": ulysses, "ring": ring}
CASES = [(kind, packed) for kind in KINDS for packed in (False, True)]


def _train(rank: int, context: ContextKind) -> list[tuple[float, float, dict[str, Any]]]:
    group, found = Group.of(), []
    for kind, packed in CASES:
        batch, model = batch_of(TOKENS, packed=packed), Decoder(KINDS[kind], seed=4).double()
        DIVIDE[context](model, group)
        mine = shard_sequence(batch, group, context)
        loss, units, gradients = loss_and_gradients(model, mine, Keys(1, 2, batch.slots_B))
        summed = torch.tensor([loss, units], dtype=torch.float64)
        for tensor in (summed, *gradients.values()):
            dist.all_reduce(tensor)
        found.append((float(summed[0]), float(summed[1]), {name: grad.numpy() for name, grad in gradients.items()}))
    return found


@pytest.mark.parametrize(
    ("context", "ranks"),
    [("ulysses", 2), pytest.param("ulysses", 3, marks=pytest.mark.slow), ("ulysses", 4), ("ring", 2), ("ring", 3)],
)
def test_loss_and_gradients_summed_over_ranks_are_those_of_one_process(context: ContextKind, ranks: int) -> None:
    everyone = run_ranks(ranks, _train, context)
    for number, (kind, packed) in enumerate(CASES):
        batch = batch_of(TOKENS, packed=packed)
        model = Decoder(KINDS[kind], seed=4).double()
        loss, units, gradients = loss_and_gradients(model, batch, Keys(1, 2, batch.slots_B))
        for found, count, theirs in (results[number] for results in everyone):
            assert found == pytest.approx(loss, rel=1e-9), kind
            assert count == pytest.approx(units, rel=1e-12)
            assert theirs.keys() == gradients.keys()
            for name, gradient in gradients.items():
                said = f"{kind} {packed} {name}"
                torch.testing.assert_close(
                    torch.from_numpy(theirs[name]), gradient, rtol=1e-5, atol=1e-8, msg=lambda m, s=said: f"{s}: {m}"
                )


def _as_data_parallel(rank: int, context: ContextKind) -> float:
    """The largest difference between P ranks with a row each, and P ranks that share P rows in turn."""
    group, batch = Group.of(), batch_of(12, packed=True, rows=3)
    parameters = []
    for divided in (False, True):
        model = Decoder(KINDS["plain"], seed=4)
        if divided:
            DIVIDE[context](model, group)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        rows = range(3) if divided else [rank]
        units = torch.zeros((), dtype=torch.float64)
        for row in rows:
            own = batch.rows(row, row + 1)
            loss = NextToken().build()(model, shard_sequence(own, group, context) if divided else own, None)
            loss.sum.backward()
            units += loss.units
        dist.all_reduce(units)
        for parameter in model.parameters():
            assert parameter.grad is not None
            dist.all_reduce(parameter.grad)
            parameter.grad /= float(units)
        optimizer.step()
        parameters.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    return float((parameters[0] - parameters[1]).abs().max())


@pytest.mark.parametrize("context", ["ulysses", "ring"])
def test_a_step_of_shared_rows_in_turn_is_the_step_of_a_row_for_each_rank(context: ContextKind) -> None:
    assert max(run_ranks(3, _as_data_parallel, context)) < 1e-6


def _refused(rank: int) -> list[str]:
    said = []
    model = Decoder(KINDS["plain"], seed=4)
    ulysses(model, Group.of())
    attempts = [
        lambda: ulysses(model, Group.of()),
        lambda: ulysses(torch.nn.Linear(2, 2), Group.of()),
        lambda: ulysses(Decoder(DecoderSettings(vocab_size=5, heads=2, layers=1)), Group.of()),
    ]
    for attempt in attempts:
        try:
            attempt()
        except ParallelError as error:
            said.append(str(error))
    return said


def test_what_cannot_be_divided_is_refused_by_name() -> None:
    for said in run_ranks(3, _refused):
        assert "divided over ranks already" in said[0]
        assert "this Linear has 0 of them" in said[1]
        assert "use at most 2, or parallel.context_kind = 'ring'" in said[2]


def test_a_group_of_one_changes_nothing() -> None:
    model, batch = Decoder(KINDS["plain"], seed=4), batch_of(7, packed=False)
    ulysses(model, Group.alone())
    assert model.sequence is None
    assert shard_sequence(batch, Group.alone()) is batch
