from __future__ import annotations

import pytest
import torch
from forked import run_ranks
from hypothesis import given
from hypothesis import strategies as st

from resilin.models.attention_core import AttentionCore
from resilin.models.decoder_settings import DecoderSettings
from resilin.models.mask import Mask, rule_mask, span_masks, training_mask
from resilin.parallel.errors import ParallelError
from resilin.parallel.group import Group
from resilin.parallel.sequence.exchange import heads_to_rows, rows_to_heads
from resilin.parallel.sequence.heads import share_heads
from resilin.parallel.sequence.ulysses import UlyssesCore

B, T, D = 2, 12, 8  # T divides by 2, 3 and 4
HEADS = [(4, 4), (4, 2), (4, 1), (6, 2), (5, 5), (6, 3), (7, 1), (8, 2)]  # query heads, key heads
DOCUMENTS = torch.tensor([[0] * 5 + [1] * 4 + [2] * 3, [0] * 10 + [-1] * 2])


@given(key_heads=st.integers(1, 8), group=st.integers(1, 8), ranks=st.integers(1, 20))
def test_any_heads_are_shared_evenly_and_every_query_finds_its_key_head(key_heads: int, group: int, ranks: int) -> None:
    heads = key_heads * group
    if ranks > heads:
        with pytest.raises(ParallelError, match="use at most"):
            share_heads(heads, key_heads, ranks)
        return
    shares = share_heads(heads, key_heads, ranks)
    assert [head for first, last in shares.queries for head in range(first, last)] == list(range(heads))
    counts = [shares.counts(rank) for rank in range(ranks)]
    assert max(count for count, _ in counts) - min(count for count, _ in counts) <= 1
    for rank, (count, keys) in enumerate(counts):
        first, low = shares.queries[rank][0], shares.keys[rank][0]
        reads = shares.reads(rank) or [number // (count // keys) for number in range(count)]
        assert [low + read for read in reads] == [head // group for head in range(first, first + count)]


def _mine(x: torch.Tensor, rank: int, ranks: int) -> torch.Tensor:
    size = x.shape[2] // ranks
    return x[:, :, rank * size : (rank + 1) * size]


def _there_and_back(rank: int, ranks: int) -> list[bool]:
    group, same = Group.of(), []
    for heads, keys in HEADS:
        if ranks > heads:
            continue
        generator = torch.Generator().manual_seed(heads)
        x = torch.randn(B, heads + 2 * keys, T, D, generator=generator)
        q, k, v = x.split([heads, keys, keys], dim=1)
        shares = share_heads(heads, keys, ranks)
        rows_q, rows_k, rows_v = heads_to_rows(*(_mine(y, rank, ranks) for y in (q, k, v)), shares, group)
        (first, last), (low, high) = shares.queries[rank], shares.keys[rank]
        same.append(torch.equal(rows_q, q[:, first:last]))
        same.append(torch.equal(rows_k, k[:, low:high]) and torch.equal(rows_v, v[:, low:high]))
        same.append(torch.equal(rows_to_heads(rows_q, shares, group), _mine(q, rank, ranks)))
    return same


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_the_exchange_gives_whole_rows_and_the_exchange_back_the_same_bits(ranks: int) -> None:
    assert all(all(same) and same for same in run_ranks(ranks, _there_and_back, ranks))


def _masks() -> list[Mask]:
    device = torch.device("cpu")
    spans = span_masks(DOCUMENTS, {None})[None]
    window = training_mask(None, T, 5, device)
    packed = training_mask(DOCUMENTS, T, 4, device)
    return [Mask(causal=True), spans, window, packed, rule_mask(DOCUMENTS, T, 4)]


def _attend(rank: int, ranks: int) -> float:
    """The largest difference from one process of outputs and gradients, relative to their size."""
    worst, group = 0.0, Group.of()
    for heads, keys in HEADS:
        if ranks > heads:
            continue
        core = AttentionCore(DecoderSettings(heads=heads, kv_heads=keys, head_size=D))
        for mask in _masks():
            generator = torch.Generator().manual_seed(3)
            q, k, v, pull = (torch.randn(B, n, T, D, generator=generator) for n in (heads, keys, keys, heads))
            whole = [x.clone().requires_grad_() for x in (q, k, v)]
            out = core(*whole, mask)
            wanted = [out.detach(), *torch.autograd.grad(out, whole, pull)]
            local = [_mine(x, rank, ranks).clone().requires_grad_() for x in (q, k, v)]
            mine = UlyssesCore(core, group)(*local, mask)
            found = [mine.detach(), *torch.autograd.grad(mine, local, _mine(pull, rank, ranks))]
            for a, b in zip(found, wanted, strict=True):
                worst = max(worst, float((a - _mine(b, rank, ranks)).abs().max() / b.abs().max()))
    return worst


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_attention_and_its_gradients_are_those_of_one_process(ranks: int) -> None:
    assert max(run_ranks(ranks, _attend, ranks)) < 1e-6


def _second(rank: int, ranks: int) -> bool:
    q, k, v = (torch.randn(1, 3, 2, 4, dtype=torch.float64, requires_grad=True) for _ in range(3))
    shares = share_heads(3, 3, ranks)

    def exchange(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(x.square() for x in heads_to_rows(*tensors, shares, Group.of()))

    first = torch.autograd.grad([x.sum() for x in exchange(q, k, v)], [q, k, v], create_graph=True)
    second = torch.autograd.grad([x.sum() for x in first], [q, k, v])
    return all(torch.equal(x, torch.full_like(x, 2.0)) for x in second)


def test_the_exchange_has_a_gradient_of_its_gradient() -> None:
    assert all(run_ranks(2, _second, 2))
