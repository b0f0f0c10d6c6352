"""Slots and their owners, slot by slot."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from resilin.parallel.pipeline import ScheduleError, SlotTable, in_blocks, in_turns, slots_of, transfers


@st.composite
def tables(draw: st.DrawFn, slots: int) -> SlotTable:
    """Any cut of the slots into micro-batches of scattered intervals, on any replicas."""
    cuts = sorted({0, slots, *draw(st.lists(st.integers(0, slots), max_size=10))})
    pieces = list(itertools.pairwise(cuts))
    replicas = draw(st.lists(st.integers(0, 9), min_size=1, max_size=5, unique=True))
    owned: dict[int, list[list[tuple[int, int]]]] = {replica: [] for replica in replicas}
    for piece in draw(st.permutations(pieces)):
        mine = owned[draw(st.sampled_from(replicas))]
        at = draw(st.integers(0, len(mine)))
        if at == len(mine):
            mine.append([])
        mine[at].append(piece)
    return SlotTable.of(slots, owned)


def where(table: SlotTable) -> dict[int, tuple[int, int, int]]:
    """slot -> (replica, micro-batch, row)."""
    found = {}
    for replica in table.replicas:
        for number, micro in enumerate(table.micros(replica)):
            for row, slot in enumerate(slots_of(micro)):
                assert slot not in found
                found[slot] = replica, number, row
    return found


@given(st.integers(1, 40).flatmap(lambda slots: st.tuples(tables(slots), tables(slots))))
@settings(max_examples=200, deadline=None)
def test_every_slot_goes_once_from_its_owner_to_its_next_owner(pair: tuple[SlotTable, SlotTable]) -> None:
    source, target = pair
    here, there = where(source), where(target)
    gone = {}
    for one in transfers(source, target):
        for offset in range(one.rows):
            slot = one.start + offset
            assert slot not in gone
            gone[slot] = (
                (one.sender, one.sender_micro, one.sender_row + offset),
                (one.receiver, one.receiver_micro, one.receiver_row + offset),
            )
    assert gone == {slot: (here[slot], there[slot]) for slot in range(source.slots)}
    back = {(t.start, t.receiver, t.sender) for t in transfers(target, source)}
    assert back == {(t.start, t.sender, t.receiver) for t in transfers(source, target)}


@given(st.integers(1, 6), st.integers(1, 5), st.integers(0, 20))
@settings(deadline=None)
def test_equal_replicas_have_one_peer_each(replicas: int, micros: int, more: int) -> None:
    slots = replicas * micros + more
    for table in (in_turns(slots, replicas, micros), in_blocks(slots, replicas, 1)):
        found = transfers(table, table)
        assert all((t.sender, t.sender_micro, t.sender_row) == (t.receiver, t.receiver_micro, 0) for t in found)
        assert len(found) == sum(len(table.micros(replica)) for replica in table.replicas)


@given(st.integers(1, 6), st.integers(1, 6), st.integers(1, 6), st.integers(0, 40))
@settings(deadline=None)
def test_stages_in_turns_stay_in_step_and_have_few_peers(here: int, there: int, micros: int, more: int) -> None:
    slots = max(here, there) * micros + more
    source, target = in_turns(slots, here, micros), in_turns(slots, there, micros)
    for table in (source, target):
        loads = [sum(e - s for s, e in micro) for replica in table.replicas for micro in table.micros(replica)]
        assert max(loads) - min(loads) <= 2  # one for the micro-batch, one for its share
    peers = Counter()
    for one in transfers(source, target):
        assert one.sender_micro == one.receiver_micro
        peers[one.sender_micro] += 1
    assert max(peers.values()) <= here + there - 1


@given(st.integers(1, 8), st.integers(1, 6), st.integers(1, 30))
@settings(deadline=None)
def test_blocks_are_whole_micro_batches_in_order(replicas: int, micro: int, more: int) -> None:
    slots = replicas * micro + more
    table = in_blocks(slots, replicas, micro)
    assert [slot for r in table.replicas for m in table.micros(r) for slot in slots_of(m)] == list(range(slots))
    counts = [len(table.micros(replica)) for replica in table.replicas]
    assert max(counts) - min(counts) <= 1
    assert counts == sorted(counts, reverse=True)


@given(st.integers(2, 6), st.integers(1, 5), st.integers(1, 4), st.data())
@settings(max_examples=150, deadline=None)
def test_losses_and_joins_keep_micro_batches_whole_and_loads_level(
    replicas: int, each: int, micro: int, data: st.DataObject
) -> None:
    table = start = in_blocks(replicas * each * micro, replicas, micro)
    whole = {m for r in start.replicas for m in start.micros(r)}
    for _ in range(data.draw(st.integers(1, 5))):
        live = table.replicas
        before = {replica: set(table.micros(replica)) for replica in live}
        if len(live) > 1 and data.draw(st.booleans()):
            lost = data.draw(st.sampled_from(live))
            table = table.without(lost)
            assert table.replicas == tuple(r for r in live if r != lost)
            assert all(before[r] <= set(table.micros(r)) for r in table.replicas)  # survivors keep their own
        else:
            new = data.draw(st.sampled_from([r for r in range(12) if r not in live]))
            table = table.joined(new)
            assert all(set(table.micros(r)) <= before[r] for r in live)  # and give to the newcomer alone
        held = [m for r in table.replicas for m in table.micros(r)]
        assert sorted(held) == sorted(whole)
        assert all(list(table.micros(r)) == sorted(table.micros(r)) for r in table.replicas)
        counts = [len(table.micros(r)) for r in table.replicas]
        assert max(counts) - min(counts) <= 1


@given(st.integers(2, 6), st.integers(1, 5), st.integers(1, 5), st.data())
@settings(max_examples=100, deadline=None)
def test_a_reshaped_loss_adds_no_micro_batch_and_keeps_the_ticks(
    replicas: int, micros: int, each: int, data: st.DataObject
) -> None:
    table = in_turns(replicas * micros * each, replicas, micros)
    tick = {slot: number for slot, (_, number, _) in where(table).items()}
    while len(table.replicas) > 1:
        table = table.without(data.draw(st.sampled_from(table.replicas)), "reshape")
        assert {len(table.micros(replica)) for replica in table.replicas} == {micros}
        assert {slot: number for slot, (_, number, _) in where(table).items()} == tick
        loads = [table.load(replica) for replica in table.replicas]
        assert sum(loads) == table.slots
        assert max(loads) - min(loads) <= 1


def test_a_loss_by_hand() -> None:
    table = in_blocks(16, 4, 2)  # 0:4, 4:8, 8:12, 12:16 in pairs
    whole = table.without(1)
    assert [whole.micros(r) for r in (0, 2, 3)] == [
        (((0, 2),), ((2, 4),), ((4, 6),)),
        (((6, 8),), ((8, 10),), ((10, 12),)),
        (((12, 14),), ((14, 16),)),
    ]
    assert whole.joined(1).micros(1) == (((4, 6),), ((10, 12),))
    shaped = in_turns(8, 2, 2).without(0, "reshape")
    assert shaped.micros(1) == (((0, 4),), ((4, 8),))
    three = transfers(in_turns(12, 4, 1), in_turns(12, 3, 1))
    assert [(t.start, t.end, t.sender, t.receiver) for t in three] == [
        (0, 3, 0, 0),
        (3, 4, 1, 0),
        (4, 6, 1, 1),
        (6, 8, 2, 1),
        (8, 9, 2, 2),
        (9, 12, 3, 2),
    ]


@pytest.mark.parametrize(
    ("owned", "message"),
    [
        ({0: [[(0, 2)]], 1: [[(3, 4)]]}, "slots 2:3 are owned by no replica"),
        ({0: [[(0, 3)]], 1: [[(2, 4)]]}, "replica 1, micro-batch 0: slot 2 is owned twice"),
        ({0: [[(0, 4)], []]}, "replica 0 has a micro-batch without slots"),
        ({0: [[(0, 3)]]}, "slots 3:4 are owned by no replica"),
        ({0: [[(0, 4), (4, 5)]]}, "replica 0, micro-batch 0: 0:5 is no interval of the 4 slots"),
        ({0: [[(0, 4)], [(2, 2)]]}, "replica 0, micro-batch 1: 2:2 is no interval"),
    ],
)
def test_a_table_that_is_not_one_is_refused(owned: dict, message: str) -> None:
    with pytest.raises(ScheduleError, match=message):
        SlotTable.of(4, owned)


def test_edits_that_cannot_be_are_said() -> None:
    table = in_blocks(4, 2, 2)
    with pytest.raises(ScheduleError, match=r"there is no replica 7; there are \[0, 1\]"):
        table.without(7)
    with pytest.raises(ScheduleError, match="replica 1 is the stage's last"):
        table.without(0).without(1)
    with pytest.raises(ScheduleError, match="replica 1 is there already"):
        table.joined(1)
    with pytest.raises(ScheduleError, match="table of 4 slots, its neighbour of 6"):
        transfers(table, in_blocks(6, 2, 2))
    with pytest.raises(ScheduleError, match="4 slots in micro-batches of 2 are too few for 3 replicas"):
        in_blocks(4, 3, 2)
    with pytest.raises(ScheduleError, match="4 slots in 2 micro-batches are too few for 3 replicas"):
        in_turns(4, 3, 2)
    with pytest.raises(ScheduleError, match="listed once each and ascending"):
        SlotTable(4, ((1, (((0, 2),),)), (0, (((2, 4),),))))
