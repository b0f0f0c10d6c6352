from __future__ import annotations

import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from resilin.memory.expert_store import ExpertStore, Geometry, StoreError

SHAPE = Geometry(layers=2, experts=3, record_bytes=5000)


def state(number: int) -> torch.Tensor:
    return torch.full((SHAPE.record_bytes,), number % 251, dtype=torch.uint8)


def read(store: ExpertStore, key) -> int:
    found = torch.empty(SHAPE.record_bytes, dtype=torch.uint8)
    store.read(key, found)
    assert (found == found[0]).all()
    return int(found[0])


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.one_of(st.just("commit"), st.just("die"), st.tuples(st.integers(0, 1), st.integers(0, 2))), max_size=30)
)
def test_whatever_is_written_only_commits_survive(tmp_path_factory, events):
    folder = tmp_path_factory.mktemp("store")
    store, now, kept, step, kept_step = ExpertStore(folder, SHAPE), {}, {}, 0, 0
    for number, event in enumerate(events, start=1):
        if event == "commit":
            step += 1
            store.commit(step)
            kept, kept_step = dict(now), step
        elif event == "die":
            store.close()
            store, now, step = ExpertStore(folder, SHAPE), dict(kept), kept_step
            assert (store.step, store.fresh) == (kept_step, kept_step == 0)
        else:
            store.write(event, state(number))
            now[event] = number
        for key, value in now.items():
            assert read(store, key) == value % 251
    store.close()


@pytest.mark.parametrize("torn", [0, 3, 20, 25])
def test_a_torn_record_is_not_believed(tmp_path, torn):
    store = ExpertStore(tmp_path, SHAPE)
    for step in (1, 2):
        store.write((1, 2), state(step))
        store.commit(step)
    place = 2 % 2 * 4096 + torn  # a byte of the second record: checksum, number, step, slots
    handle = os.open(tmp_path / "commits.raw", os.O_RDWR)
    byte = os.pread(handle, 1, place)[0]
    os.pwrite(handle, bytes([byte ^ 255]), place)
    os.close(handle)
    store.close()
    again = ExpertStore(tmp_path, SHAPE)
    assert (again.step, read(again, (1, 2))) == (1, 1)


def test_a_store_of_another_shape_is_refused(tmp_path):
    ExpertStore(tmp_path, SHAPE).close()
    with pytest.raises(StoreError, match="use another folder"):
        ExpertStore(tmp_path, Geometry(2, 4, 5000))


def test_scratch_takes_one_slot_each_begins_anew_and_commits_nothing(tmp_path):
    scratch = Geometry(2, 3, 5000, slots=1)
    assert 2 * scratch.disk_bytes == SHAPE.disk_bytes
    store = ExpertStore(tmp_path, scratch)
    store.write((1, 2), state(7))
    store.write((1, 2), state(8))
    assert read(store, (1, 2)) == int(store.view((1, 2))[0]) == 8
    with pytest.raises(StoreError, match="nothing can be committed"):
        store.commit(1)
    with pytest.raises(StoreError, match="another process trains on these experts"):
        ExpertStore(tmp_path, scratch)
    store.close()
    assert read(ExpertStore(tmp_path, scratch), (1, 2)) == 0


def test_bytes_are_counted_and_files_are_as_large_as_planned(tmp_path):
    store = ExpertStore(tmp_path, SHAPE)
    store.write((0, 0), state(1))
    assert read(store, (0, 0)) == 1
    assert (store.read_bytes, store.written_bytes) == (5000, 5000)
    files = sum(path.stat().st_size for path in tmp_path.glob("layer-*"))
    assert files == SHAPE.disk_bytes == 2 * 8192 * 3 * 2
