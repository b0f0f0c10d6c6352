"""Copies of states: in memory, between members, and from some owners to others."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from resilin.cluster.checksum import checksum
from resilin.cluster.peer import Peer, PeerError, PeerServer
from resilin.cluster.pool import Copy, CopyError, Pool, copy_of
from resilin.cluster.restore import Need, Owners, Restorer, pieces_held, pieces_owned
from resilin.cluster.snapshots import Snapshots, StoppedError
from resilin.layout.dealing import deal, redeal
from resilin.memory.pages import Pages
from resilin.parallel.ownership import Ownership

SIZES = (5, 64, 1000, 4097)
NAMES = ("a", "b", "c", "d")


@given(st.binary(max_size=300), st.data())
@settings(max_examples=80)
def test_a_sum_changes_with_every_bit_and_place(raw: bytes, data: st.DataObject):
    tensor = torch.frombuffer(bytearray(raw or b"\0"), dtype=torch.uint8)
    was, bit = checksum(tensor), data.draw(st.integers(0, 8 * len(tensor) - 1))
    tensor[bit // 8] ^= 1 << (bit % 8)
    assert checksum(tensor) != was
    tensor[bit // 8] ^= 1 << (bit % 8)
    assert checksum(tensor) == was
    assert checksum(torch.cat([tensor, torch.zeros(1, dtype=torch.uint8)])) != was


def test_a_sum_of_many_blocks_knows_where_they_stand():
    blocks = torch.randint(0, 255, (4, 1 << 17), dtype=torch.uint8)
    assert checksum(blocks) != checksum(blocks[[1, 0, 2, 3]].contiguous())


def copy(owner: int = 1, version: int = 3, epoch: int = 0, scale: float = 1.0) -> Copy:
    tensors = [
        ("w", "weights", torch.arange(7.0) * scale),
        ("w", "step", torch.tensor(version)),
        ("", "x", torch.ones(2, 3)),
    ]
    return copy_of(owner, epoch, version, tensors, {"run": {"step": version}})


def test_large_and_small_tensors_are_copied_and_summed_up_in_stretches():
    pool, draw = Pool(0), torch.Generator().manual_seed(0)
    sizes = [(3,), (700, 300), (90_000,), (1,), (0,), (65_536,), (131_073,), (4, 262_144), (17,)]
    for _ in range(4):  # into new memory, and into memory that was used before
        given = [torch.randn(size, generator=draw) for size in sizes]
        given += [torch.randn(600, 500, generator=draw).T, torch.arange(300_000), torch.ones(5, dtype=torch.bfloat16)]
        made = copy_of(1, 0, 3, [(str(n), "x", tensor) for n, tensor in enumerate(given)], None, pool)
        made.check()
        for slot, tensor in zip(made.slots, given, strict=True):
            assert torch.equal(made.tensor(slot), tensor)
        pool._keep(made.pages)


def far(near: Copy) -> Copy:
    """The same copy in memory that no other process can map."""
    return replace(near, pages=Pages(near.data.clone()))


def test_the_last_two_versions_of_every_owner_and_epoch_are_kept():
    pool = Pool(0)
    for version in range(5):
        pool.put(copy(1, version))
        pool.put(copy(2, version, epoch=version // 3))
    assert pool.versions() == {(1, 0): [3, 4], (2, 0): [1, 2], (2, 1): [3, 4]}
    pool.forget(1)
    assert pool.versions() == {(2, 1): [3, 4]}
    with pytest.raises(CopyError, match="member 0 has no copy of member 1's states of epoch 0, version 4"):
        pool.get(1, 0, 4)


def test_memory_is_used_again():
    pool, seen = Pool(1), set()
    for version in range(12):
        made = copy_of(
            1, version // 6, version, [("w", "weights", torch.full((6400 + version,), float(version)))], None, pool
        )
        seen.add(made.data.data_ptr())
        pool.put(made)
        pool.forget(version // 6)
        for kept in pool.versions()[1, version // 6]:
            pool.get(1, version // 6, kept).check()
    assert len(seen) == 3, "two that are kept, and one that is filled"


def test_memory_is_there_for_more_than_was_owned():
    pool = Pool(1)
    for version in range(8):
        if version == 3:
            pool.reserve(4000)
            pool.reserve(4000)  # it is there
        pool.put(copy_of(1, 0, version, [("w", "weights", torch.full((400,), 1.0))], None, pool))
        assert pool.get(1, 0, version).pages.data.numel() < 2000, "the smallest that fits is taken"
    assert pool.memory(4000).data.numel() == 4000
    assert pool.memory(4000).data.numel() > 4000, "there was one"
    pool.reserve(10_000)
    assert pool.memory(1000).data.numel() < 4000, "what is far too large is let go of"
    assert pool.memory(10_000).data.numel() > 10_000


def test_a_flipped_bit_is_found():
    damaged = copy()
    damaged.data[3] ^= 4
    with pytest.raises(CopyError, match=r"member 1's states of version 3 is damaged"):
        damaged.check()


def test_copies_go_to_another_member_and_pieces_come_back():
    mine, theirs = Pool(1), Pool(2)
    server = PeerServer(theirs, "secret")
    try:
        peer = Peer(server.address, "secret", 10)
        sent = copy()
        peer.put(sent)
        mine.put(sent)
        assert theirs.get(1, 0, 3).head() == sent.head()
        assert peer.head(1, 0, 3) == sent.head()
        weights = sent.slots[0]
        (piece,) = peer.get(1, 0, 3, [(weights.start + 8, 12)])
        assert piece.view(torch.float32).tolist() == [2.0, 3.0, 4.0]
        with pytest.raises(CopyError, match="version 9"):
            peer.get(1, 0, 9, [(0, 4)])
        with pytest.raises(CopyError, match="bytes"):
            peer.get(1, 0, 3, [(0, 1 << 30)])
        assert peer.head(1, 0, 3) == sent.head()  # a refusal ends nothing
    finally:
        server.close()


def test_what_is_where_is_told_once_and_when_it_changes():
    theirs = Pool(2)
    server = PeerServer(theirs, "secret")
    try:
        peer = Peer(server.address, "secret", 10)
        lengths = []
        say = peer._channel.say

        def counted(message: Mapping[str, Any], *data: memoryview) -> None:
            lengths.append("slots" in message["head"])
            say(message, *data)

        peer._channel.say = counted  # type: ignore[method-assign]
        pool = Pool(1)
        for version, size in ((3, 5), (4, 5), (5, 5), (6, 9), (7, 9), (8, 5)):
            made = copy_of(1, 0, version, [("w", "weights", torch.arange(float(size)))], None, pool)
            peer.put(made)
            pool.put(made)
            kept = theirs.get(1, 0, version)
            kept.check()
            assert kept.head() == made.head()
        assert lengths == [True, False, False, True, False, True]
    finally:
        server.close()


def test_who_does_not_know_the_secret_is_not_heard():
    server = PeerServer(Pool(2), "secret")
    try:
        with pytest.raises(PeerError):
            Peer(server.address, "guess", 10).put(copy())
    finally:
        server.close()
    with pytest.raises(PeerError, match="no member listens"):
        Peer(server.address, "secret", 10)


def test_a_copy_that_is_damaged_on_the_way_is_refused_and_the_one_before_stays():
    theirs = Pool(2)
    server = PeerServer(theirs, "secret")
    try:
        peer = Peer(server.address, "secret", 10)
        peer.put(far(copy(version=3)))
        bad = far(copy(version=4))
        bad.data[0] ^= 1
        with pytest.raises(CopyError, match="damaged"):
            peer.put(bad)
        assert theirs.versions() == {(1, 0): [3]}
    finally:
        server.close()


def test_snapshots_are_waited_for_until_all_holders_have_them():
    pools = {2: Pool(2), 3: Pool(3)}
    servers = {number: PeerServer(pool, "s") for number, pool in pools.items()}
    snapshots = Snapshots(lambda number: Peer(servers[number].address, "s", 10))
    try:
        snapshots.begin([2, 3])
        for version in (3, 4):
            snapshots.give(copy(version=version))
            snapshots.wait(version)
        assert [pool.versions() for pool in pools.values()] == [{(1, 0): [3, 4]}] * 2
        waiting = threading.Timer(0.05, snapshots.stop, ["the view has ended"])
        waiting.start()
        with pytest.raises(StoppedError, match="the view has ended"):
            snapshots.wait(5)
        snapshots.begin([3])
        snapshots.give(copy(version=5, epoch=1))
        snapshots.wait(5)
        assert pools[3].versions() == {(1, 0): [3, 4], (1, 1): [5]}
        servers[3].close()
        snapshots.give(copy(version=6, epoch=1))
        with pytest.raises(StoppedError):
            snapshots.wait(6)
    finally:
        snapshots.close()
        for server in servers.values():
            server.close()


def owners(table: tuple[int, ...], members: tuple[int, ...], whole: tuple[int | None, ...] = (None,) * 4) -> Owners:
    return Owners(NAMES, Ownership(SIZES, table, whole, len(members)), members)


@given(st.integers(1, 5), st.integers(0, 4), st.booleans())
@settings(max_examples=25, deadline=None)
def test_what_members_own_afterwards_is_made_of_what_copies_hold(members: int, lost: int, matrix: bool):
    whole = (None, 0, None, members - 1) if matrix else (None,) * 4
    before = owners(deal(64, members), tuple(range(members)), whole)
    values = {name: torch.randn(size) for name, size in zip(NAMES, SIZES, strict=True)}
    lost = lost % members if members > 1 else -1
    left = (*(number for number in range(members) if number != lost), 9)  # the last is a newcomer
    table = redeal([left.index(o) if o != lost else None for o in before.ownership.owners], len(left))
    after = owners(table, left, tuple(None if w is None else 0 for w in whole))
    pools = {number: Pool(number) for number in left}
    where = {}
    for index, number in enumerate(before.members):
        tensors = []
        for row, name in enumerate(NAMES):
            runs = before.ownership.runs_of(row, index)
            if runs:
                mine = torch.cat([values[name][run.begin : run.end] for run in runs])
                tensors += [(name, "weights", mine), (name, "m", -mine), (name, "step", torch.tensor(7.0))]
        where[number] = number if number != lost else left[0]
        pools[where[number]].put(copy_of(number, 0, 3, tensors, {"of": number}))
    servers = {number: PeerServer(pool, "s") for number, pool in pools.items()}
    try:
        for index, number in enumerate(left):
            restorer = Restorer(pools[number], 0, 3, where, lambda n: Peer(servers[n].address, "s", 10))
            needs, wanted = [], []
            for name, pieces in pieces_owned([before], [after], number).items():
                runs = after.ownership.runs_of(NAMES.index(name), index)
                expected = torch.cat([values[name][run.begin : run.end] for run in runs])
                for path, right in (("weights", expected), ("m", -expected), ("step", torch.tensor(7.0))):
                    needs.append(Need(name, path, torch.empty_like(right), pieces))
                    wanted.append(right)
            for name, pieces in pieces_held([before], [after], NAMES, number).items():
                needs.append(Need(name, "weights", torch.empty_like(values[name]), pieces))
                wanted.append(values[name])
            restorer.fill(needs)
            assert all(torch.equal(need.memory, right) for need, right in zip(needs, wanted, strict=True))
    finally:
        for server in servers.values():
            server.close()


def test_what_stays_is_not_sent():
    before = owners(deal(64, 4), (0, 1, 2, 3))
    table = redeal([owner if owner != 3 else None for owner in before.ownership.owners], 3)
    after = owners(table, (0, 1, 2))
    for number in (0, 1, 2):
        far = [p for pieces in pieces_owned([before], [after], number).values() for p in pieces if p.owner != number]
        assert {piece.owner for piece in far} == {3}
