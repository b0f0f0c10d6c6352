from __future__ import annotations

import math

import pytest
import torch
from forked import run_ranks
from hypothesis import given
from hypothesis import strategies as st

from resilin.parallel.errors import ParallelError
from resilin.parallel.fused_buckets import FusedBuckets, PackingTable
from resilin.parallel.group import Group

SHAPES = {"embed": (13, 8), "norm": (8,), "q": (8, 8), "scale": (), "up": (40, 8), "down": (8, 40), "last": (3,)}
SIZES = [1, 4 * 100, 4 * 300, 25 << 20]  # every tensor by itself, several buckets, one


@given(
    sizes=st.lists(st.lists(st.integers(0, 5), max_size=3), max_size=8),
    ranks=st.integers(1, 5),
    elements=st.integers(0, 60),
)
def test_every_element_has_its_own_place(sizes, ranks, elements):
    shapes = {str(number): tuple(shape) for number, shape in enumerate(sizes)}
    table = PackingTable.of(shapes, ranks, elements)
    taken = [[0] * length for length in table.lengths]
    for place in table.places.values():
        for at in range(place.offset, place.offset + math.prod(place.shape)):
            taken[place.bucket][at] += 1
    assert all(count <= 1 for bucket in taken for count in bucket)
    assert sum(map(sum, taken)) == sum(math.prod(shape) for shape in shapes.values())
    assert all(length % (16 * ranks) == 0 for length in table.lengths)
    assert [name for bucket in range(len(table.lengths)) for name in table.names(bucket)] == list(shapes)
    for bucket in range(len(table.lengths)):
        parts = [math.prod(table.places[name].shape) for name in table.names(bucket)]
        assert sum(parts) <= max(elements, max(parts))


def gradients(rank: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(rank)
    return {name: torch.randn(shape, generator=generator) * 10.0**rank for name, shape in SHAPES.items()}


def exchanged(rank: int, world: int) -> list[str]:
    group, wrong = Group.of(), []
    everyone = [gradients(other) for other in range(world)]
    for size in SIZES:
        buckets = FusedBuckets(SHAPES, group, size)
        for turn in range(2):
            order = list(SHAPES)
            if turn:  # gradients come in another order on each rank, and one of them on some ranks only
                order = order[rank:] + order[:rank]
            expected = {}
            for name in SHAPES:
                has = [other for other in range(world) if not turn or name != "q" or other != 1]
                zeros = torch.zeros(SHAPES[name])
                parts = [everyone[other][name] if other in has else zeros for other in range(world)]
                total = parts[0].clone()
                for part in parts[1:]:
                    total = total + part
                expected[name] = total
            for name in order:
                if not (turn and name == "q" and rank == 1):
                    buckets.put(name, everyone[rank][name])
            slices = buckets.reduced()
            assert [len(part) * world for part in slices] == list(buckets.table.lengths)
            found = buckets.gathered(slices)
            wrong += [f"{size}, {turn}: {name}" for name in SHAPES if not torch.equal(found[name], expected[name])]
        parameters = gradients(7)
        gathered = buckets.gathered(buckets.slices(parameters))
        wrong += [f"{size}: {name}" for name in SHAPES if not torch.equal(gathered[name], parameters[name])]
        shared = {tensor.untyped_storage().data_ptr() for tensor in gathered.values()}
        assert len(shared) == len(buckets.table.lengths)  # views, not copies
    return wrong


@pytest.mark.parametrize("world", [2, 3, 4])
def test_packed_sums_are_those_of_every_tensor_by_itself_to_the_bit(world):
    assert run_ranks(world, exchanged, world) == [[]] * world


def test_one_rank_needs_nobody():
    buckets = FusedBuckets(SHAPES, Group.alone())
    for name, tensor in gradients(0).items():
        buckets.put(name, tensor)
    found = buckets.gathered(buckets.reduced())
    assert all(torch.equal(found[name], tensor) for name, tensor in gradients(0).items())


def test_a_bucket_is_sent_when_it_is_full_and_those_before_it_are():
    buckets = FusedBuckets(SHAPES, Group.alone(), 1)
    order = list(SHAPES)
    buckets.put(order[1], gradients(0)[order[1]])
    assert len(buckets._waits) == 0
    buckets.put(order[0], gradients(0)[order[0]])
    assert len(buckets._waits) == 2


def test_what_does_not_belong_is_refused():
    buckets = FusedBuckets({"a": (2,)}, Group.alone())
    with pytest.raises(ParallelError, match="no such tensor"):
        buckets.put("b", torch.zeros(2))
    with pytest.raises(ParallelError, match="have shape"):
        buckets.put("a", torch.zeros(3))
    buckets.put("a", torch.zeros(2))
    with pytest.raises(ParallelError, match="a second time"):
        buckets.put("a", torch.zeros(2))
