from __future__ import annotations

import pytest
import torch
from forked import run_ranks

from resilin.parallel.errors import ParallelError
from resilin.parallel.expert import FlatExchange, TwoLevelExchange
from resilin.parallel.expert.exchange import send, send_back
from resilin.parallel.group import Group, make_groups

EVEN, UNEVEN, MOSTLY_NONE = "even", "uneven", "mostly none"


def counts_of(kind: str, world: int, kinds: int) -> torch.Tensor:
    """(sender, receiver, kind) rows."""
    generator = torch.Generator().manual_seed(world * 10 + kinds)
    counts = torch.randint(0, 5, (world, world, kinds), generator=generator)
    if kind == EVEN:
        return torch.full_like(counts, 3)
    return counts * (counts > 3) if kind == MOSTLY_NONE else counts


def two_level(rank: int, world: int, nodes: int) -> TwoLevelExchange:
    per = world // nodes
    ranks = list(range(world))
    node = make_groups([ranks[i * per : (i + 1) * per] for i in range(nodes)], rank, "node")
    peers = make_groups([ranks[k::per] for k in range(per)], rank, "peers")
    return TwoLevelExchange(Group.of(), node, peers)


def both_ways(rank: int, world: int) -> list[str]:
    """Every way to factor the ranks, against one step and against what was sent."""
    wrong = []
    for nodes in [n for n in range(1, world + 1) if world % n == 0]:
        exchange, flat = two_level(rank, world, nodes), FlatExchange(Group.of())
        for kind in (EVEN, UNEVEN, MOSTLY_NONE):
            for kinds in (1, 3):
                everyone = counts_of(kind, world, kinds)
                mine = everyone[rank]
                came, route = exchange.route(mine)
                came_flat, flat_route = flat.route(mine)
                # A row says who sent it to whom, as what kind, and which it is.
                rows = torch.tensor(
                    [(rank, to, c, i) for to in range(world) for c in range(kinds) for i in range(mine[to, c])]
                ).view(-1, 4)
                rows = torch.cat([rows.double(), torch.randn(len(rows), 3, dtype=torch.float64)], 1).requires_grad_()
                there = send(rows, route)
                want = torch.tensor(
                    [(s, rank, c, i) for s in range(world) for c in range(kinds) for i in range(everyone[s, rank, c])]
                ).view(-1, 4)
                back = send_back(there, route)
                pull = torch.randn(there.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(rank))
                (grad,) = torch.autograd.grad(there, rows, pull, retain_graph=True)
                checks = {
                    "counts": torch.equal(came, came_flat) and torch.equal(came, everyone[:, rank]),
                    "order": torch.equal(there[:, :4].long(), want),
                    "flat": torch.equal(there, flat_route.there(rows.detach())),
                    "back": torch.equal(back, rows),
                    "gradient": torch.equal(grad, flat_route.back(pull)),
                }
                wrong += [f"{nodes} nodes, {kind}, {kinds} kinds: {name}" for name, good in checks.items() if not good]
    return wrong


@pytest.mark.parametrize("world", [4, 6])
def test_two_levels_give_what_one_gives_for_every_way_to_factor_the_ranks(world):
    assert run_ranks(world, both_ways, world) == [[]] * world


def test_eight_ranks():
    assert run_ranks(8, both_ways, 8) == [[]] * 8


def messages(rank: int) -> tuple[int, int]:
    """Bytes-carrying messages to ranks of another node, of 2 nodes with 3 ranks: in two steps, and in one."""
    exchange = two_level(rank, 6, 2)
    _, route = exchange.route(torch.ones(6, 1, dtype=torch.int64))
    between = sum(count > 0 for i, count in enumerate(route.sent_b) if i != exchange.peers.index)  # type: ignore[attr-defined]
    return between, 3


def test_between_nodes_a_rank_sends_one_message_to_each_node():
    assert run_ranks(6, messages) == [(1, 3)] * 6


def test_groups_that_do_not_fit_are_refused():
    alone = Group.alone()
    with pytest.raises(ParallelError, match="are not nodes of 1"):
        TwoLevelExchange(alone, Group.alone(1), alone)


def test_one_rank_keeps_its_rows():
    _, route = FlatExchange(Group.alone()).route(torch.tensor([[2, 1]]))
    rows = torch.randn(3, 2)
    assert torch.equal(send_back(send(rows, route), route), rows)
