"""Which sample a slot reads is a function of seed, step and slot, and every epoch reads every sample once."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from resilin.data.errors import DataError
from resilin.data.order import BatchSizes, SampleOrder, _order

quick = settings(deadline=None, max_examples=50)

SIZES = st.builds(
    lambda first, changes: BatchSizes(first, tuple(sorted(dict(changes).items()))),
    st.integers(1, 9),
    st.lists(st.tuples(st.integers(1, 12), st.integers(1, 9)), max_size=3),
)


@quick
@given(sizes=SIZES, step=st.integers(0, 30))
def test_slots_before_a_step_are_the_sum_of_all_earlier_steps(sizes: BatchSizes, step: int) -> None:
    assert sizes.before(step) == sum(sizes.at(earlier) for earlier in range(step))


@quick
@given(
    rows=st.integers(1, 60),
    seed=st.integers(0, 2**40),
    sizes=SIZES,
    epochs=st.integers(1, 3),
    shuffle=st.booleans(),
    workers=st.lists(st.integers(1, 5), min_size=1, max_size=4),
    data=st.data(),
)
def test_each_epoch_reads_every_sample_once_whoever_fetches_and_wherever_it_was_resumed(
    rows: int, seed: int, sizes: BatchSizes, epochs: int, shuffle: bool, workers: list[int], data: st.DataObject
) -> None:
    order = SampleOrder(rows, seed, sizes, shuffle=shuffle, epochs=epochs)
    read: list[int] = []
    step = 0
    while slots := order.slots(step):
        # The workers that share this step's slots come and go; after a resume they hold a fresh object.
        count = workers[step % len(workers)]
        owners = [data.draw(st.integers(0, count - 1)) for _ in range(slots)]
        by_slot: dict[int, int] = {}
        for worker in range(count):
            mine = [slot for slot in range(slots) if owners[slot] == worker]
            fresh = SampleOrder(rows, seed, sizes, shuffle=shuffle, epochs=epochs)
            by_slot |= dict(zip(mine, fresh.row_of(step, mine).tolist(), strict=True))
        read += [by_slot[slot] for slot in range(slots)]
        step += 1
    assert len(read) == epochs * rows
    for epoch in range(epochs):
        assert sorted(read[epoch * rows : (epoch + 1) * rows]) == list(range(rows))


def test_epochs_are_in_different_orders_and_unshuffled_ones_in_the_same() -> None:
    shuffled = SampleOrder(100, 1, BatchSizes(100))
    assert not np.array_equal(shuffled.row_of(0, range(100)), shuffled.row_of(1, range(100)))
    plain = SampleOrder(100, 1, BatchSizes(100), shuffle=False)
    assert plain.row_of(1, range(100)).tolist() == list(range(100))


def test_another_seed_reads_in_another_order() -> None:
    orders = [SampleOrder(100, seed, BatchSizes(100)).row_of(0, range(100)).tolist() for seed in (1, 2)]
    assert orders[0] != orders[1]


@quick
@given(unique=st.integers(1, 50), seed=st.integers(0, 9))
def test_unique_rows_are_the_same_few_in_every_epoch_and_nested(unique: int, seed: int) -> None:
    order = SampleOrder(50, seed, BatchSizes(unique), unique_rows=unique)
    epochs = [Counter(order.row_of(epoch, range(unique)).tolist()) for epoch in range(3)]
    assert epochs[0] == epochs[1] == epochs[2]
    assert len(epochs[0]) == unique
    smaller = SampleOrder(50, seed, BatchSizes(unique), unique_rows=max(1, unique - 1))
    assert set(smaller.row_of(0, range(unique)).tolist()) <= set(epochs[0])


def test_orders_too_long_for_a_table_are_computed_to_the_same_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    order = SampleOrder(1000, 7, BatchSizes(300), unique_rows=500)
    tabulated = [order.row_of(step, range(300)).tolist() for step in range(4)]
    monkeypatch.setattr("resilin.data.order._TABULATED", 0)
    _order.cache_clear()
    assert [order.row_of(step, range(300)).tolist() for step in range(4)] == tabulated
    _order.cache_clear()


def test_a_source_that_ends_gives_a_short_last_step_then_none() -> None:
    order = SampleOrder(10, 0, BatchSizes(4), epochs=1)
    assert [order.slots(step) for step in range(5)] == [4, 4, 2, 0, 0]
    assert order.epoch(2) == 0.8
    with pytest.raises(DataError, match="step 3: the data ended: 1 epochs of 10 samples"):
        order.row_of(3, [0])
    with pytest.raises(DataError, match="step 2 has slots 0 to 1"):
        order.row_of(2, [2])


def test_impossible_batch_sizes_are_refused() -> None:
    with pytest.raises(DataError, match="at least 1"):
        BatchSizes(0)
    with pytest.raises(DataError, match="should increase"):
        BatchSizes(1, ((5, 2), (3, 4)))
