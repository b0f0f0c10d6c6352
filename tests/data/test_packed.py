"""Packing loses no token, keeps documents apart where asked, and gives any slot to anyone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from resilin.data.errors import DataError
from resilin.data.packed import PackedSource, Shards
from resilin.data.rows import DocumentRows
from resilin.data.settings import SourceContext
from resilin.data.shards import TokenShards
from resilin.nouns import Batch, Source

Make = Callable[..., TokenShards]
LENGTHS = st.lists(st.integers(1, 40), min_size=2, max_size=25)
shared = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40, deadline=None)
NONE_HELD = {"fraction": 0.0}


def build(shards: TokenShards, *, split: str = "train", batch: int = 3, seed: int = 0, **kw: Any) -> PackedSource:
    return Shards(path=shards.folder, **kw).build(SourceContext(seed, split, batch))  # type: ignore[arg-type]


def epoch(source: PackedSource) -> list[Batch]:
    return [source.fetch(step, range(source.slots(step))) for step in range(len(source))]


def stream_of(shards: TokenShards) -> list[int]:
    return [token for number in range(len(shards.shards)) for token in shards.tokens(number).tolist()]


@shared
@given(lengths=LENGTHS, T=st.integers(1, 50), per_shard=st.integers(1, 60))
def test_every_token_is_a_label_exactly_once_and_follows_its_own_input(
    make_shards: Make, lengths: list[int], T: int, per_shard: int
) -> None:
    shards = make_shards(lengths, per_shard=per_shard)
    if shards.token_count < 2:
        return
    source = build(shards, sequence_length=T, held_out=NONE_HELD, epochs=1)
    labels: Counter[int] = Counter()
    for batch in epoch(source):
        real = batch["labels"] != -100
        assert torch.equal(batch["labels"][real], batch["tokens"][real] + 1)  # the tokens count up from 1
        labels.update(batch["labels"][real].tolist())
    assert labels == Counter(stream_of(shards)[1:])


@shared
@given(lengths=LENGTHS, T=st.integers(1, 50), by=st.sampled_from(["documents", "tail"]), part=st.floats(0.01, 0.9))
def test_splits_are_disjoint_and_together_everything(
    make_shards: Make, lengths: list[int], T: int, by: str, part: float
) -> None:
    shards = make_shards(lengths, per_shard=30)
    held_out = {"fraction": part, "by": by}
    streams = []
    for split in ("train", "validation"):
        try:
            source = build(shards, split=split, sequence_length=T, held_out=held_out, epochs=1)
        except DataError:  # a split of fewer than two tokens is refused
            return
        out = np.zeros(len(source.stream), shards.dtype)
        source.stream.read_into(out, 0, len(out))
        streams.append(out.tolist())
    assert Counter(streams[0] + streams[1]) == Counter(stream_of(shards))
    if by == "documents":  # whole documents: every run of the held-out stream begins and ends with a document
        starts = set(np.cumsum([0, *lengths]).tolist())
        held = np.asarray(streams[1])
        runs = np.split(held, np.flatnonzero(np.diff(held) != 1) + 1)
        assert all(int(run[0]) - 1 in starts and int(run[-1]) in starts for run in runs)


@shared
@given(lengths=LENGTHS, T=st.integers(2, 50), packing=st.sampled_from(["stream", "documents", "pad"]))
def test_separate_documents_restart_positions_and_never_predict_across(
    make_shards: Make, lengths: list[int], T: int, packing: str
) -> None:
    shards = make_shards(lengths, per_shard=30)
    source = build(
        shards, sequence_length=T, separate_documents=True, held_out=NONE_HELD, epochs=1, packing=packing,
        long_documents="truncate",
    )  # fmt: skip
    owner = np.repeat(np.arange(len(lengths)), lengths)  # token value - 1 -> document
    for batch in epoch(source):
        for tokens, labels, positions, documents in zip(
            *(batch[name].tolist() for name in ("tokens", "labels", "positions", "documents")), strict=True
        ):
            assert positions[0] == documents[0] == 0
            for t in range(T):
                if labels[t] != -100:
                    assert owner[tokens[t] - 1] == owner[labels[t] - 1]
                if t and tokens[t]:  # 0 is padding here
                    same = owner[tokens[t] - 1] == owner[tokens[t - 1] - 1]
                    assert (documents[t] == documents[t - 1]) == same
                    assert positions[t] == (positions[t - 1] + 1 if same else 0)


@shared
@given(lengths=LENGTHS, T=st.integers(2, 60), one_each=st.booleans(), data=st.data())
def test_whole_documents_are_kept_or_counted(
    make_shards: Make, lengths: list[int], T: int, one_each: bool, data: st.DataObject
) -> None:
    shards = make_shards(lengths, per_shard=30)
    policy = data.draw(st.sampled_from(["truncate", "skip"]))
    long = [length for length in lengths if length > T + 1]
    try:
        source = build(
            shards, sequence_length=T, packing="pad" if one_each else "documents", held_out=NONE_HELD,
            long_documents=policy, shuffle=False, epochs=1,
        )  # fmt: skip
    except DataError:
        assert policy == "skip"
        assert len(long) == len(lengths)
        return
    rows = source.rows
    assert isinstance(rows, DocumentRows)
    kept = int((rows.stops - rows.starts).sum())
    assert kept + rows.lost_tokens == shards.token_count
    assert (rows.truncated, rows.skipped) == ((len(long), 0) if policy == "truncate" else (0, len(long)))
    assert int((rows.stops - rows.starts).max()) <= T + 1
    if one_each:
        assert len(rows) == len(lengths) - rows.skipped


def test_a_long_document_is_an_error_that_names_its_place(make_shards: Make) -> None:
    shards = make_shards([5, 30, 5])
    with pytest.raises(DataError, match=r"shard-00000\.tokens, byte 10: document 1 has 30 tokens; a row holds 9"):
        build(shards, sequence_length=8, packing="documents", held_out=NONE_HELD)


@pytest.mark.parametrize("separate", [False, True])
def test_any_slot_alone_equals_its_row_of_the_whole_batch(make_shards: Make, separate: bool) -> None:
    source = build(make_shards([7, 40, 3, 60, 25]), sequence_length=8, batch=6, separate_documents=separate)
    assert isinstance(source, Source)
    whole = source.fetch(5, range(6))
    again = build(make_shards([7, 40, 3, 60, 25]), sequence_length=8, batch=6, separate_documents=separate)
    parts = [again.fetch(5, slots) for slots in ([0], [1, 2, 3], [5, 4])]
    for name, tensor in whole.fields.items():
        assert torch.equal(torch.cat([part[name] for part in parts]), tensor[[0, 1, 2, 3, 5, 4]])
    assert parts[2].slots_B.tolist() == [5, 4]
    assert source.fetch(0, [])["tokens"].shape == (0, 8)


def test_units_outside_the_mask_are_no_labels(make_shards: Make) -> None:
    from resilin.data.write_shards import write_index, write_shard

    base = make_shards([10])
    folder = base.folder.with_name("masked")
    folder.mkdir()
    tokens = np.arange(1, 11, dtype="<u2").tobytes()
    units = bytes([0, 0, 1, 1, 0, 0, 1, 0, 0, 1])
    shard = write_shard(folder, "shard-00000", tokens, [0, 5], dtype="uint16", text_bytes=0, units=units)
    shards = write_index(folder, [shard], dtype="uint16", vocab_size=100, tokenizer=None, record={})
    source = build(shards, sequence_length=9, held_out=NONE_HELD)
    labels = source.fetch(0, [0])["labels"][0]
    assert labels[labels != -100].tolist() == [3, 4, 7, 10]


def test_the_validation_split_is_the_same_for_every_seed_and_ends(make_shards: Make) -> None:
    shards = make_shards([20] * 40)
    kw = {"split": "validation", "sequence_length": 8, "held_out": {"fraction": 0.2}, "batch": 4}
    first, second = (build(shards, seed=seed, **kw) for seed in (1, 2))
    assert len(first) == 5  # 160 tokens in 20 rows
    assert [first.slots(step) for step in range(6)] == [4, 4, 4, 4, 4, 0]
    for step in range(len(first)):
        assert torch.equal(first.fetch(step, range(4))["tokens"], second.fetch(step, range(4))["tokens"])


def test_unique_tokens_repeat_a_random_part_in_every_epoch(make_shards: Make) -> None:
    source = build(make_shards([400]), sequence_length=10, unique_tokens=100, batch=10, held_out=NONE_HELD)
    rows = [sorted(source.fetch(step, range(10))["tokens"][:, 0].tolist()) for step in range(3)]
    assert rows[0] == rows[1] == rows[2]
    assert rows[0] != list(range(1, 101, 10))  # not simply the beginning
    with pytest.raises(DataError, match="has only 400 tokens"):
        build(make_shards([400]), sequence_length=10, unique_tokens=401 + 10, held_out=NONE_HELD)


def test_batch_sizes_may_change_at_a_step_without_losing_a_sample(make_shards: Make) -> None:
    changes = ((2, 5), (4, 1))
    source = build(make_shards([400]), sequence_length=10, batch=3, batch_changes=changes, epochs=1, held_out=NONE_HELD)
    assert [source.slots(step) for step in range(6)] == [3, 3, 5, 5, 1, 1]
    firsts = [token for batch in epoch(source) for token in batch["tokens"][:, 0].tolist()]
    assert sorted(firsts) == list(range(1, 400, 10))


def test_resuming_on_other_data_seed_or_batch_size_is_refused(make_shards: Make) -> None:
    shards = make_shards([50, 50])
    state = build(shards, sequence_length=8).state_dict()
    build(shards, sequence_length=8).load_state_dict(state)
    for changed, message in (
        (build(make_shards([50, 51]), sequence_length=8), "other data"),
        (build(shards, sequence_length=9), "another packing"),
        (build(shards, sequence_length=8, seed=1), "seed was 0, now it is 1"),
        (build(shards, sequence_length=8, batch=4), "set source.batch_changes"),
    ):
        with pytest.raises(DataError, match=message):
            changed.load_state_dict(state)


def test_one_document_cannot_be_split_by_documents(make_shards: Make) -> None:
    with pytest.raises(DataError, match=r"held_out\.by=tail"):
        build(make_shards([50]), split="validation", sequence_length=8)


def test_a_document_goes_on_from_shard_to_shard_when_held_out(make_shards: Make) -> None:
    shards = make_shards([5, 5], per_shard=5)
    # Take the second start away: one document of ten tokens over two shards, then split one of the three held out.
    from resilin.data.write_shards import write_index, write_shard

    folder = shards.folder.with_name("spanning")
    folder.mkdir()
    parts = []
    for number, (first, starts) in enumerate([(1, [0, 3]), (6, []), (11, [2])]):
        tokens = np.arange(first, first + 5, dtype="<u2").tobytes()
        parts.append(write_shard(folder, f"shard-{number}", tokens, starts, dtype="uint16", text_bytes=0))
    opened = write_index(folder, parts, dtype="uint16", vocab_size=100, tokenizer=None, record={})
    held = set()
    for seed in range(12):
        source = build(opened, split="validation", sequence_length=4, held_out={"fraction": 0.3, "seed": seed})
        out = np.zeros(len(source.stream), np.int64)
        source.stream.read_into(out, 0, len(out))
        held.add(tuple(out.tolist()))
    assert held == {(1, 2, 3), tuple(range(4, 13)), (13, 14, 15)}
