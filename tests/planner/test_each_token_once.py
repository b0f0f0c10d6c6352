"""One epoch reads every row exactly once: whatever stops the run, and however many workers share the slots."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from resilin.data.errors import DataError
from resilin.data.order import BatchSizes, SampleOrder
from resilin.data.packed import PackedSource, Shards
from resilin.data.settings import SourceContext
from resilin.data.shards import TokenShards
from resilin.data.write_shards import write_documents

WORKERS = st.lists(st.integers(1, 6), min_size=1, max_size=6)


def rows_by_workers(order: SampleOrder, first: int, last: int, workers: int) -> list[int]:
    """The rows that `workers` processes read in some steps, each asking for its own share of the slots."""
    read: list[int] = []
    for step in range(first, last):
        slots = list(range(order.slots(step)))
        for worker in range(workers):
            read += order.row_of(step, slots[worker::workers]).tolist()
    return read


@given(st.integers(1, 300), st.integers(1, 40), st.integers(0, 2**32), WORKERS, st.booleans())
@settings(deadline=None)
def test_in_one_epoch_every_row_is_read_once_by_any_number_of_workers_that_may_change_at_any_step(
    rows: int, batch: int, seed: int, workers: list[int], shuffle: bool
) -> None:
    steps = -(-rows // batch)
    cuts = sorted({0, steps, *(steps * i // len(workers) for i in range(1, len(workers)))})
    read: list[int] = []
    for first, last, count in zip(cuts, cuts[1:], workers, strict=False):
        # A new order at each cut: what a process that resumes builds from the settings, knowing the step alone.
        order = SampleOrder(rows, seed, BatchSizes(batch), shuffle=shuffle, epochs=1)
        read += rows_by_workers(order, first, last, count)
    assert sorted(read) == list(range(rows))
    assert order.slots(steps) == 0


@given(st.integers(2, 200), st.integers(1, 30), st.integers(2, 5), st.integers(0, 2**32))
@settings(deadline=None)
def test_each_of_several_epochs_reads_every_row_once_in_an_order_of_its_own(
    rows: int, batch: int, epochs: int, seed: int
) -> None:
    order = SampleOrder(rows, seed, BatchSizes(batch), epochs=epochs)
    read = rows_by_workers(order, 0, -(-rows * epochs // batch), workers=1)
    passes = [read[epoch * rows : (epoch + 1) * rows] for epoch in range(epochs)]
    assert len(read) == epochs * rows
    assert all(sorted(rows_of_pass) == list(range(rows)) for rows_of_pass in passes)
    if rows > 20:
        assert passes[0] != passes[1]


@pytest.fixture
def source(tmp_path: Path) -> Callable[..., PackedSource]:
    """A source over 400 different tokens in documents of several lengths; every token names its place."""
    edges = [0, 7, 60, 61, 200, 333, 400]
    documents = [np.arange(a, b) + 1 for a, b in itertools.pairwise(edges)]
    shards: TokenShards = write_documents(tmp_path / "shards", documents, 401, tokens_per_shard=90)

    def build(batch: int = 6, **changes: object) -> PackedSource:
        held_out = {"fraction": 0.1, "by": "tail"}
        tree = {"path": shards.folder, "sequence_length": 8, "held_out": held_out, "epochs": 1, **changes}
        return Shards.model_validate(tree).build(SourceContext(3, "train", batch))

    return build


def inputs(source: PackedSource, steps: range, workers: int) -> list[int]:
    found: list[int] = []
    for step in steps:
        slots = list(range(source.slots(step)))
        for worker in range(workers):
            found += source.fetch(step, slots[worker::workers])["tokens"].flatten().tolist()
    return found


def test_every_token_of_the_training_split_is_an_input_once_also_after_a_resume_with_more_workers(
    source: Callable[..., PackedSource],
) -> None:
    first = source()
    steps = len(first)
    read = inputs(first, range(3), workers=1)
    resumed = source()
    resumed.load_state_dict(first.state_dict())
    read += inputs(resumed, range(3, steps), workers=4)
    # 360 tokens of training text: 44 rows of 8 inputs; the last 8 places hold no ninth token to predict.
    whole_rows = [token for token in read if token != 0]
    assert len(set(whole_rows)) == len(whole_rows)
    assert set(range(1, 353)) <= set(whole_rows) <= set(range(1, 361))
    with pytest.raises(DataError, match="the data ended: 1 epochs"):
        resumed.fetch(steps, [0])


def test_a_repeated_share_reads_the_same_few_tokens_again_and_no_others(source: Callable[..., PackedSource]) -> None:
    few = source(unique_tokens=80, epochs=4)
    read = inputs(few, range(len(few)), workers=2)
    counts = np.bincount(read)
    assert len(read) == 4 * 80
    assert set(counts[counts > 0].tolist()) == {4}


def test_a_resume_on_other_data_or_another_order_is_refused(source: Callable[..., PackedSource]) -> None:
    state = source().state_dict()
    with pytest.raises(DataError, match="batch_size was 6, now it is 5"):
        source(batch=5).load_state_dict(state)
    with pytest.raises(DataError, match="other data or another packing"):
        source(unique_tokens=80).load_state_dict(state)
