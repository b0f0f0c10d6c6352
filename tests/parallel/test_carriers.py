"""Parts of flat memory get from rank to rank in messages, and through memory that all see: alike."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from forked import run_ranks

from resilin.memory.pages import Handle, Pages, PagesError
from resilin.parallel import reduction
from resilin.parallel.canonical import Node
from resilin.parallel.carriers import Carrier, Messages, SharedMemory, carrier_of
from resilin.parallel.degrees import Degrees
from resilin.parallel.exchange import add_up
from resilin.parallel.group import Group
from resilin.parallel.ownership import Ownership
from resilin.parallel.reduction import Reduction
from resilin.parallel.world import World

RANKS = 3


def group_of(rank: int) -> Group:
    return World(Degrees(data=RANKS), rank).everyone


def carriers(rank: int, group: Group, size: int) -> list[Carrier]:
    pages = Pages.of(4 * size)
    shared = carrier_of(group, pages.data.view(torch.float32), pages)
    messages = carrier_of(group, torch.zeros(size), None)
    assert isinstance(shared, SharedMemory)
    assert isinstance(messages, Messages)
    return [shared, messages]


def value(by: int, to: int, count: int, turn: int) -> torch.Tensor:
    return torch.arange(count, dtype=torch.float32) + 1000 * by + 100 * to + 10_000 * turn


def swaps(rank: int) -> list[str]:
    group, wrong = group_of(rank), []
    for carrier in carriers(rank, group, 4):
        for turn, base in enumerate((3, 0, 5, 5, 40, 7, 1)):  # less, nothing, as much, more than there was room for
            table = [
                [0 if by == to else base * (by + 1) + to * (base > 3) for to in range(RANKS)] for by in range(RANKS)
            ]
            room = carrier.room(table)
            parts = [value(rank, to, count, turn) for to, count in enumerate(table[rank])]
            room.copy_(torch.cat(parts))
            arrived = carrier.swap(room, table)
            if rank == turn % RANKS:
                time.sleep(0.02)  # the others go on: what is packed next must not lie where this rank still reads
            for by, part in enumerate(arrived()):
                if not torch.equal(part, value(by, rank, table[by][rank], turn)):
                    wrong.append(f"{type(carrier).__name__}, turn {turn}, by {by}: {part.tolist()}")
                part += 1  # sums are added up in place
    add_up(torch.ones(1), group)  # nobody leaves before all have read what it sent
    return wrong


def test_what_is_packed_arrives_however_much_it_is():
    assert run_ranks(RANKS, swaps) == [[]] * RANKS


def shows(rank: int) -> list[list[float]]:
    group, found = group_of(rank), []
    pages = Pages.of(4 * (rank + 2))
    flat = pages.data.view(torch.float32)
    for carrier in (carrier_of(group, flat, pages), carrier_of(group, flat, None)):
        flat.copy_(torch.arange(rank + 2) + 10.0 * rank)
        carrier.show()
        parts = carrier.weights([(by, by + 2) for by in range(RANKS)])()
        found.append(torch.cat([part.clone() for part in parts]).tolist())
        carrier.swap(carrier.room([[0] * RANKS] * RANKS), [[0] * RANKS] * RANKS)()  # all have looked
        add_up(torch.ones(1), group)  # nobody leaves before all have read what it sent
    return found


def test_weights_of_all_are_seen():
    assert run_ranks(RANKS, shows) == [[[0.0, 1.0, 11.0, 12.0, 22.0, 23.0]] * 2] * RANKS


def blind(rank: int) -> str:
    if rank == 1:

        def refuses(handle: Handle) -> Pages:
            raise PagesError("no")

        Pages.mapped = refuses  # type: ignore[method-assign, assignment]
    pages = Pages.of(64)
    return type(carrier_of(group_of(rank), pages.data.view(torch.float32), pages)).__name__


def test_where_one_cannot_map_the_pages_of_another_all_send_messages():
    assert run_ranks(RANKS, blind) == ["Messages"] * RANKS


def steps(rank: int, shared: bool, exact: bool, owners: Sequence[int]) -> list[Any]:
    """Sums, weights and squared norms of some steps, with blocks that differ from rank to rank and step to step."""
    draw = torch.Generator().manual_seed(3)
    parameters = [
        (name, torch.nn.Parameter(torch.randn(shape, generator=draw)))
        for name, shape in (("a", (7, 33)), ("b", (5,)), ("c", (64, 65)), ("d", (1,)))
    ]
    sizes = tuple(p.numel() for _, p in parameters)
    ownership = Ownership(sizes, tuple(owners), (None, None, None, 2), RANKS)
    made = Reduction(parameters, group_of(rank), ownership, exact=exact, bucket_bytes=4000, shared=shared)
    found: list[Any] = []
    for step, blocks in enumerate(
        ([[(0, 1)], [(2, 1)], [(4, 2)]], [[(0, 1), (4, 0)], [(2, 1), (5, 0)], [(6, 1)]], [[], [(0, 2), (4, 1)], []])
    ):
        from resilin.parallel.canonical import Node

        sums = []
        for by, each in enumerate(blocks):
            for start, height in each:
                made_of = torch.Generator().manual_seed(100 * step + start)
                grads = [torch.randn(p.shape, generator=made_of) for _, p in parameters]
                if by == rank:
                    sums.append(Node(start, height, [None if step == 1 and n == 1 else g for n, g in enumerate(grads)]))
        made.reduce(sums, blocks)
        made.set_gradients([True] * 4)
        found.append({name: shard.grad.clone() for name, shard in made.shards.items() if shard.grad is not None})
        found.append(made.squares())
        with torch.no_grad():
            for shard in made.shards.values():
                if shard.grad is not None:
                    shard -= 0.1 * shard.grad
        made.gather()
        found.append([p.detach().clone() for _, p in parameters])
    made.read()
    found.append({name: shard.detach().clone() for name, shard in made.shards.items()})
    add_up(torch.ones(1), made.group)  # nobody leaves before all have read what it sent
    return found


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("owners", [(0, 1, 2, 0), (2, 0, 0, 1, 0, 2, 1, 1)], ids=["runs", "mixed"])
def test_sums_and_weights_are_the_same_bits_either_way(exact: bool, owners: Sequence[int]):
    near, far = (run_ranks(RANKS, steps, shared, exact, owners) for shared in (True, False))
    for mine, theirs in zip(near, far, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0)
    for told in near:
        torch.testing.assert_close(told[2::3][:3], near[0][2::3][:3], rtol=0, atol=0)


def steps_in_used_memory(rank: int, owners: Sequence[int]) -> list[Any]:
    for spares, pages in ((reduction._shown, Pages.of(1 << 16)), (reduction._own, Pages.alone(1 << 16))):
        pages.data.fill_(255)  # no numbers
        spares.give(pages)
    found = steps(rank, True, True, owners)
    assert not reduction._shown._free
    assert not reduction._own._free
    return found


def test_what_lay_in_memory_that_is_used_again_is_nowhere_in_the_sums():
    owners = (2, 0, 0, 1, 0, 2, 1, 1)
    used, new = run_ranks(RANKS, steps_in_used_memory, owners), run_ranks(RANKS, steps, True, True, owners)
    for mine, theirs in zip(used, new, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0)


def test_who_is_alone_with_what_it_owns_adds_up_whatever_blocks_it_has():
    """Experts that one worker has: its micro-batches need not begin with the first."""
    parameter = torch.nn.Parameter(torch.zeros(4))
    made = Reduction([("w", parameter)], Group.alone(), Ownership((4,), (0,), (None,), 1), exact=False)
    made.reduce([Node(3, 0, [torch.ones(4)]), Node(4, 1, [torch.full((4,), 2.0)])], [[(3, 0), (4, 1)]])
    assert parameter.grad is not None
    assert parameter.grad.tolist() == [3.0] * 4
