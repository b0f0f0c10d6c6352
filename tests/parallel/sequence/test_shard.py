from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from resilin.nouns import Batch
from resilin.objective.distill import DistilledLoss
from resilin.objective.next_token import NextToken
from resilin.parallel.errors import ParallelError
from resilin.parallel.group import Group
from resilin.parallel.sequence.part import RankPart
from resilin.parallel.sequence.shard import refuse_whole_rows, shard_sequence


class _Ranks:
    """Stands where a process group does: dividing a batch asks nobody."""


def group_of(rank: int, ranks: int) -> Group:
    return Group(tuple(range(ranks)), rank, _Ranks())  # type: ignore[arg-type]


def batch_of(rows: int, tokens: int) -> Batch:
    fields = {
        "tokens": torch.arange(rows * tokens).view(rows, tokens) + 7,
        "labels": torch.arange(rows * tokens).view(rows, tokens) + 8,
        "weights": torch.rand(rows, tokens),
        "log_probabilities": torch.rand(rows, tokens, 3),
        "reward": torch.rand(rows),
    }
    return Batch(torch.arange(rows), fields)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 3),
    tokens=st.integers(1, 20),
    ranks=st.integers(2, 5),
    kind=st.sampled_from(["ulysses", "ring"]),
)
def test_the_shares_of_all_ranks_are_the_batch_and_padding(rows, tokens, ranks, kind):
    batch, device = batch_of(rows, tokens), torch.device("cpu")
    shares = [shard_sequence(batch, group_of(rank, ranks), kind) for rank in range(ranks)]
    size = shares[0]["tokens"].shape[1]
    padded = size * ranks
    assert 0 <= padded - tokens < ranks * (2 if kind == "ring" else 1)
    places = torch.cat([RankPart(kind, group_of(rank, ranks)).places(size, device) for rank in range(ranks)])
    assert sorted(places.tolist()) == list(range(padded))
    for name, field in batch.fields.items():
        if name == "reward":
            assert all(share[name] is field for share in shares)
            continue
        joined = torch.cat([share[name] for share in shares], dim=1)[:, places.argsort()]
        assert torch.equal(joined[:, :tokens], field)
        assert joined.dtype == field.dtype
        assert (joined[:, tokens:] == (-100 if name == "labels" else 0)).all()
    positions = torch.cat([share["positions"] for share in shares], dim=1)[:, places.argsort()]
    assert torch.equal(positions, torch.arange(padded).repeat(rows, 1))
    if padded > tokens:
        documents = torch.cat([share["documents"] for share in shares], dim=1)[:, places.argsort()]
        assert (documents[:, :tokens] == 0).all()
        assert (documents[:, tokens:] == -1).all()
    else:
        assert "documents" not in shares[0].fields


def test_given_positions_and_documents_are_kept_and_go_on_into_the_padding():
    fields = {
        "tokens": torch.tensor([[5, 6, 7, 8, 9]]),
        "positions": torch.tensor([[0, 1, 0, 1, 2]]),
        "documents": torch.tensor([[0, 0, 1, 1, 1]], dtype=torch.int32),
    }
    last = shard_sequence(Batch(torch.arange(1), fields), group_of(1, 2))
    assert last["positions"].tolist() == [[1, 2, 3]]
    assert last["documents"].tolist() == [[1, 1, -1]]
    assert last["tokens"].tolist() == [[8, 9, 0]]


@pytest.mark.parametrize("ranks", [2, 3, 8])
def test_ring_pieces_give_every_rank_the_same_causal_work(ranks: int):
    size, device = 4, torch.device("cpu")
    seen = [int((RankPart("ring", group_of(r, ranks)).places(2 * size, device) + 1).sum()) for r in range(ranks)]
    assert len(set(seen)) == 1


def test_objectives_of_whole_rows_are_refused_by_name():
    refuse_whole_rows(NextToken().build())
    with pytest.raises(ParallelError, match="DistilledLoss looks at whole rows"):
        refuse_whole_rows(DistilledLoss.__new__(DistilledLoss))
    with pytest.raises(ParallelError, match="object looks at whole rows"):
        refuse_whole_rows(object())
