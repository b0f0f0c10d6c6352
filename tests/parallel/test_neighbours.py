"""Ranks of one machine exchange through memory: everything that is exchanged arrives, in the same bits at all."""

from __future__ import annotations

import gc
import os
import socket
import time
import weakref
from typing import Any

import pytest
import torch
import torch.distributed as dist
from forked import run_ranks
from torch import Tensor

from resilin.cluster.failure import kind_of
from resilin.memory.pages import Pages, PagesError, spares
from resilin.parallel import exchange
from resilin.parallel.group import Group, make_groups, named, of_all
from resilin.parallel.lines import Kind, Line, NeighbourError, Said
from resilin.parallel.meeting import _known
from resilin.parallel.messages import tell_all
from resilin.parallel.neighbours import _SMALL, Neighbours

RANKS = 3


def near(group: Group) -> Neighbours:
    assert group.near is not None
    return group.near


def value(by: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    draw = torch.Generator().manual_seed(by)
    return (8 * torch.randn(shape, generator=draw)).to(dtype)


def collectives(rank: int) -> list[str]:
    """What goes through memory against what messages give, and the same bits at all ranks."""
    through_memory, by_messages, wrong = of_all(), Group.of(), []
    near(through_memory)
    assert by_messages.near is None
    shapes = [(), (0,), (1,), (7,), (3, 6, 5), (_SMALL // 4 + 1,), (5, _SMALL // 8), (2,)]
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.uint8):
        loose = {"rtol": 2e-2, "atol": 0.5} if dtype is torch.bfloat16 else {"rtol": 1e-6, "atol": 1e-6}
        for shape in shapes:
            x = value(rank, *shape, dtype=dtype)
            for name, do in PATTERNS.items():
                if name != "add_up" and name != "largest" and (not shape or not shape[0] or shape[0] % RANKS):
                    continue
                got, wanted = do(x.clone(), through_memory), do(x.clone(), by_messages)
                if not torch.allclose(got.double(), wanted.double(), **loose) or got.dtype != wanted.dtype:
                    wrong.append(f"{name} {dtype} {shape}")
            total = exchange.add_up(x.clone(), through_memory)
            for other in through_memory.near.tell(total.view(torch.uint8).numpy().tobytes() if shape else b""):
                if shape and other != total.view(torch.uint8).numpy().tobytes():
                    wrong.append(f"bits of the sum of {shape}")
    return wrong


PATTERNS = {
    "add_up": exchange.add_up,
    "largest": exchange.largest,
    "gathered": lambda x, group: exchange.gathered(x, -1, group),
    "scattered": lambda x, group: exchange.scattered_sum(x.contiguous(), 0, group),
    "swapped": lambda x, group: exchange.swapped_equal(x, group),
}


def test_collectives_give_what_messages_give_in_the_same_bits_at_all_ranks():
    assert run_ranks(RANKS, collectives) == [[]] * RANKS


def uneven(rank: int) -> list[str]:
    group, wrong = of_all(), []
    for turn, base in enumerate((1, 0, 7, 700, 3)):
        table = [[(base * (by + 2 * to)) % 11 for to in range(RANKS)] for by in range(RANKS)]
        rows = [value(10 * rank + to, table[rank][to], 4) for to in range(RANKS)]
        if rank == turn % RANKS:
            time.sleep(0.02)
        got = exchange.swapped(torch.cat(rows), table[rank], [row[rank] for row in table], group)
        if not torch.equal(got, torch.cat([value(10 * by + rank, table[by][rank], 4) for by in range(RANKS)])):
            wrong.append(f"turn {turn}")
    told = tell_all({"rank": rank, "text": "x" * 1000 * rank}, group)
    assert [len(one["text"]) for one in told] == [0, 1000, 2000]
    with pytest.raises(ValueError, match="2 rows were to come"):
        exchange.swapped(torch.zeros(RANKS, 2), [1] * RANKS, [2] * RANKS, group)
    return wrong


def test_rows_in_numbers_that_differ_arrive_and_others_are_refused():
    assert run_ranks(RANKS, uneven) == [[]] * RANKS


def growing(rank: int) -> list[float]:
    """Sums of tensors that grow past every room, each rank slow in its turn; and what was shown is not written over."""
    group, found = of_all(), []
    for turn in range(12):
        x = torch.full((1 + 40_000 * turn,), float(rank + turn))
        shown = near(group)._show(x)
        if turn % RANKS == rank:
            time.sleep(0.01)
        found.append(float(sum(part.sum() for part in shown) / len(x)))
    return found


def test_rooms_grow_and_are_not_filled_while_somebody_reads():
    assert run_ranks(RANKS, growing) == [[3.0 + 3 * turn for turn in range(12)]] * RANKS


def letters(rank: int) -> tuple[list[str], int]:
    group, wrong = of_all(), []
    to, by = (rank + 1) % RANKS, (rank - 1) % RANKS
    for turn in range(6):
        for tag in range(4):
            assert exchange.post(value(100 * rank + tag, 3, 50 + 500 * turn), to, tag, group) is None
        for tag in (2, 0, 3, 1):  # not in the order in which they were sent
            came = torch.empty(3, 50 + 500 * turn)
            exchange.ask(came, by, tag, group)()
            if not torch.equal(came, value(100 * by + tag, 3, 50 + 500 * turn)):
                wrong.append(f"turn {turn}, tag {tag}")
        exchange.add_up(torch.ones(1), group)  # between letters, for nobody to be far ahead
    return wrong, len(near(group)._boxes)


def test_letters_are_found_by_their_tags_and_boxes_are_used_again():
    found = run_ranks(RANKS, letters)
    assert [wrong for wrong, _ in found] == [[]] * RANKS
    assert all(boxes <= 4 * 6 for _, boxes in found)  # each turn's are larger than those before


def later(rank: int) -> list[str]:
    """Exchanges whose ends are waited for after others have begun."""
    group, wrong = of_all(), []
    for _ in range(3):
        parts = [value(by, by) for by in range(RANKS)]  # the first has nothing to give
        mine = [part if by == rank else torch.zeros_like(part) for by, part in enumerate(parts)]
        shared = exchange.share(mine, group)
        table = [[by * to for to in range(RANKS)] for by in range(RANKS)]
        gets = [row[rank] for row in table]
        received = torch.empty(sum(gets))
        sent = torch.cat([value(10 * rank + to, table[rank][to]) for to in range(RANKS)])
        swapped = exchange.swap(received, sent, gets, table[rank], group)
        total = exchange.add_up(torch.ones(2), group)
        swapped()
        shared()
        if not torch.equal(received, torch.cat([value(10 * by + rank, gets[by]) for by in range(RANKS)])):
            wrong.append("swap")
        if not all(map(torch.equal, mine, parts)) or total.tolist() != [3, 3]:
            wrong.append("share")
    exchange.add_up(torch.ones(1), group)  # nobody leaves before all have read
    return wrong


def test_exchanges_that_end_later_arrive():
    assert run_ranks(RANKS, later) == [[]] * RANKS


def groups(rank: int) -> list[Any]:
    pair = make_groups([[0, 2], [1, 3]], rank, "pair")
    everyone = of_all()
    by_name = named(everyone.name), named(pair.name)
    some = everyone.among([0, 1]) if rank < 2 else everyone.among([2, 3])
    return [
        exchange.add_up(torch.tensor([float(rank)]), pair).item(),
        exchange.add_up(torch.tensor([float(rank)]), some).item(),
        by_name[0].near is everyone.near and by_name[1].near is pair.near and everyone.near is not None,
        some.near is not None,
    ]


def test_groups_of_groups_and_groups_by_name_are_near_as_well():
    assert run_ranks(4, groups) == [[2, 1, True, True], [4, 1, True, True], [2, 5, True, True], [4, 5, True, True]]


def refuses(*arguments: object, **named: object) -> Any:
    raise PagesError("no")


def refused(*arguments: object, **named: object) -> Any:
    raise ConnectionRefusedError("no")


def hindered(rank: int, what: str) -> list[Any]:
    """One that cannot do its part of meeting the others."""
    if rank == 1:
        {
            "map": lambda: setattr(Pages, "mapped", refuses),
            "connect": lambda: setattr(socket, "create_connection", refused),
            "listen": lambda: setattr(socket, "create_server", refused),
            "have pages": lambda: setattr(spares, "take", refused),
        }[what]()
    group = of_all()
    return [group.near, exchange.add_up(torch.ones(1), group).item()]


@pytest.mark.parametrize("what", ["map", "connect", "listen", "have pages"])
def test_where_one_cannot_all_send_messages(what: str):
    assert run_ranks(RANKS, hindered, what) == [[None, 3.0]] * RANKS


def dropped(rank: int) -> tuple[bool, int]:
    group = Group.of()
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    met = group.met()
    exchange.post(torch.ones(10), (rank + 1) % RANKS, 0, met)
    exchange.ask(torch.ones(10), (rank - 1) % RANKS, 0, met)()
    exchange.add_up(torch.ones(100_000), met)
    gone = weakref.ref(near(met))
    dist.barrier()
    near(met).give_up()
    del met
    gc.collect()
    kept = spares.take(200_000)  # the room that had grown
    assert not kept.data[:8].view(torch.float32).isnan().any()
    del kept
    spares._free.clear()
    return gone() is None, len(os.listdir("/proc/self/fd")) - before  # noqa: PTH208


def test_a_group_that_nobody_has_any_more_leaves_nothing_open():
    assert run_ranks(RANKS, dropped) == [(True, 0)] * RANKS


def dies(rank: int) -> tuple[str, str, float]:
    group = of_all()
    dist.barrier()
    if rank == 0:  # the system ends its connections, as of a process that is killed
        for line in near(group)._lines.values():
            line.close()
        return "", "", 0.0
    began = time.monotonic()
    with pytest.raises(NeighbourError) as caught:
        exchange.add_up(torch.ones(1), group)
    return kind_of(caught.value), str(caught.value), time.monotonic() - began


def test_whoever_waits_for_one_that_is_gone_hears_it_at_once():
    _, *others = run_ranks(RANKS, dies)
    assert all(kind == "lost" and "worker 0 was ended" in text and took < 20 for kind, text, took in others)


def sleeps(rank: int) -> tuple[str, str]:
    group = Group.of().met(0.2)
    dist.barrier()
    if rank == 0:
        told = "", ""
    else:
        with pytest.raises(NeighbourError) as caught:
            exchange.ask(torch.zeros(1), 0, 0, group)()
        told = kind_of(caught.value), str(caught.value)
    dist.barrier()
    return told


def test_whoever_waits_too_long_says_for_whom():
    assert run_ranks(2, sleeps)[1] == ("timeout", "timed out: worker 0 has said nothing for 0.2 s")


def test_memory_of_a_process_that_is_gone_counts_as_a_lost_connection():
    mine, theirs = socket.socketpair(socket.AF_UNIX)
    with theirs:
        made = object.__new__(Neighbours)
        with pytest.raises(NeighbourError, match="the memory of rank 1") as caught:
            made._mapped((os.getpid(), 100_000, 1, 1, 1), 1)
        assert kind_of(caught.value) == "lost"
        mine.close()


def test_whoever_does_not_know_the_secret_is_not_let_in():
    token = b"0123456789abcdef"
    for said, who in (((3).to_bytes(8, "little") + token, 3), (bytes(8) + token[::-1], None), (b"short", None)):
        mine, theirs = socket.socketpair()
        with mine, theirs:
            theirs.sendall(said)
            theirs.shutdown(socket.SHUT_WR)
            assert _known(mine, token) == who


def connected() -> tuple[Line, Line]:
    with socket.create_server(("127.0.0.1", 0)) as door:
        one = socket.create_connection(door.getsockname())
        other, _ = door.accept()
    return Line(one, 1, 5.0), Line(other, 0, 5.0)


def test_a_line_sorts_what_it_hears():
    one, other = connected()
    for said in (Said(Kind.LETTER, 4, 1, 8), Said(Kind.SHOWN, 0), Said(Kind.TAKEN, 0, 7), Said(Kind.LETTER, 4, 2, 8)):
        other.say(said)
    assert one.hear(Kind.SHOWN, 0) == Said(Kind.SHOWN, 0)
    assert [one.hear(Kind.LETTER, 4).box for _ in range(2)] == [1, 2]
    assert one.taken == [7]
    one.look()  # nothing more was said: it does not wait
    other.say(Said(Kind.TAKEN, 0, 9))
    until = time.monotonic() + 20
    while one.taken == [7] and time.monotonic() < until:
        one.look()
    assert one.taken == [7, 9]
    one.close()
    with pytest.raises(NeighbourError, match="the connection to worker 0 was ended"):
        other.hear(Kind.SHOWN, 0)
    other.close()
