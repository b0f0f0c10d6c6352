from __future__ import annotations

import pytest
import torch
from forked import run_ranks
from torch import nn

from resilin.models.linear import Embedding
from resilin.parallel.column_embedding import ColumnEmbedding, partition_embedding
from resilin.parallel.errors import ParallelError
from resilin.parallel.group import Group

V, H = 11, 12


def table(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(V, H, generator=torch.Generator().manual_seed(0), dtype=dtype)


def tokens(rank: int) -> torch.Tensor:
    """Each rank has another number, rank 1 none."""
    shape = [(2, 3), (0, 3), (1, 3), (4, 3)][rank]
    return torch.randint(V - 1, shape, generator=torch.Generator().manual_seed(rank))


def compared(rank: int, world: int) -> list[str]:
    group = Group.of()
    wrong = []
    whole = nn.Parameter(table())
    pulls = [torch.randn(*tokens(r).shape, H, generator=torch.Generator().manual_seed(9 + r)) for r in range(world)]
    module = ColumnEmbedding(table(), group)
    out = module(tokens(rank))
    if not torch.equal(out, whole[tokens(rank)]):
        wrong.append("forward")
    out.backward(pulls[rank])
    grad = torch.zeros(V, H)
    for r in range(world):  # in the order of ranks and positions
        for token, pull in zip(tokens(r).flatten().tolist(), pulls[r].view(-1, H), strict=True):
            grad[token] += pull
    assert module.weight.grad is not None
    if not torch.equal(module.weight.grad, grad.chunk(world, 1)[rank]):
        wrong.append("gradient")
    return wrong


@pytest.mark.parametrize("world", [2, 3, 4])
def test_rows_and_gradients_are_those_of_the_whole_table_to_the_bit(world):
    assert run_ranks(world, compared, world) == [[]] * world


def replaced(rank: int) -> list[bool]:
    model = nn.Sequential()
    model.add_module("embed", Embedding(V, H))
    model.embed.weight = nn.Parameter(table())
    local = partition_embedding(model, "embed", Group.of())
    ids = tokens(rank)
    return [
        list(dict(model.named_parameters())) == ["embed.weight"],
        torch.equal(model.embed.weight, local.part("embed.weight", table())),
        torch.equal(model(ids), table()[ids]),
    ]


def test_the_rest_of_the_model_does_not_see_it():
    assert run_ranks(2, replaced) == [[True] * 3] * 2


def refused(rank: int) -> list[str]:
    said = []
    for work in (
        lambda: ColumnEmbedding(table()[:, :5], Group.of()),
        lambda: partition_embedding(nn.Sequential(nn.Linear(2, 2)), "0", Group.of()),
    ):
        try:
            work()
        except ParallelError as error:
            said.append(str(error))
    return said


def test_what_cannot_be_cut_is_refused():
    for said in run_ranks(2, refused):
        assert said == ["5 columns cannot be divided evenly among 2 ranks", "0 is a Linear, not an embedding"]


def test_one_rank_has_the_whole_table():
    module = ColumnEmbedding(table(), Group.alone())
    assert torch.equal(module(tokens(0)), table()[tokens(0)])
