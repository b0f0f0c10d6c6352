"""Prefetching changes no batch; a mix keeps its proportions exactly and each source's order."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from resilin.data.errors import DataError
from resilin.data.mix import Cycle, Mix, MixSource, whole_weights
from resilin.data.packed import PackedSource, Shards
from resilin.data.prefetch import Prefetch, PrefetchSource
from resilin.data.settings import SourceContext
from resilin.data.shards import TokenShards
from resilin.nouns import Batch, Source

quick = settings(deadline=None, max_examples=50)

Make = Callable[..., TokenShards]


def tree(shards: TokenShards, **kw: Any) -> dict[str, Any]:
    return {"use": "resilin.data.packed:Shards", "path": str(shards.folder), "sequence_length": 8, **kw}


class Watched:
    """A source that remembers who asked it for what."""

    def __init__(self, source: PackedSource) -> None:
        self.source = source
        self.asked: list[tuple[int, tuple[int, ...]]] = []
        self.threads: set[int] = set()

    def slots(self, step: int) -> int:
        return self.source.slots(step)

    def fetch(self, step: int, slots: Sequence[int]) -> Batch:
        self.asked.append((step, tuple(slots)))
        self.threads.add(threading.get_ident())
        return self.source.fetch(step, slots)

    def state_dict(self) -> dict[str, Any]:
        return self.source.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.source.load_state_dict(state)


@quick
@given(
    requests=st.lists(
        st.tuples(st.integers(0, 9), st.lists(st.integers(0, 3), max_size=4, unique=True)), min_size=1, max_size=20
    ),
    ahead=st.integers(1, 3),
)
def test_prefetched_batches_are_the_same_whatever_is_asked(
    shared_shards: TokenShards, requests: list[tuple[int, list[int]]], ahead: int
) -> None:
    plain = Shards.model_validate({k: v for k, v in tree(shared_shards, epochs=1).items() if k != "use"})
    source = plain.build(SourceContext(3, "train", 4))
    prefetched = PrefetchSource(source, ahead)
    for step, slots in requests:
        mine, theirs = prefetched.fetch(step, slots), source.fetch(step, slots)
        assert mine.slots_B.tolist() == slots
        assert all(torch.equal(mine[name], theirs[name]) for name in theirs.fields)


@pytest.fixture(scope="module")
def shared_shards(tmp_path_factory: pytest.TempPathFactory) -> TokenShards:
    from resilin.data.write_shards import write_documents

    documents = [np.arange(1, 41) + 40 * i for i in range(10)]
    return write_documents(tmp_path_factory.mktemp("shared"), documents, 1000)


def test_a_steady_reader_finds_its_batches_fetched_ahead_in_another_thread(shared_shards: TokenShards) -> None:
    watched = Watched(Shards(path=shared_shards.folder, sequence_length=8).build(SourceContext(0, "train", 4)))
    prefetched = PrefetchSource(watched, ahead=2)
    for step in range(4):
        for part in ([0, 1], [2, 3]):
            prefetched.fetch(step, part)
    assert len(watched.asked) == len(set(watched.asked))  # nothing is fetched twice
    assert threading.get_ident() not in watched.threads
    prefetched._pool.shutdown()
    assert {(step, slots) for step in range(6) for slots in ((0, 1), (2, 3))} <= set(watched.asked)


def test_prefetch_shows_what_the_source_behind_has_and_never_asks_past_its_end(shared_shards: TokenShards) -> None:
    settings = Prefetch.model_validate({"source": tree(shared_shards, epochs=1), "ahead": 3})
    source = settings.build(SourceContext(0, "train", 4))
    assert isinstance(source, Source)
    assert source.vocab_size == 1000
    assert source.sequence_length == 8
    assert len(source) == len(source.source)  # type: ignore[arg-type]
    for step in range(len(source)):
        source.fetch(step, range(source.slots(step)))
    with pytest.raises(DataError, match="the data ended"):
        source.fetch(len(source), [0])
    source.load_state_dict(source.state_dict())


def test_a_failure_in_the_background_reaches_the_reader(shared_shards: TokenShards) -> None:
    source = PrefetchSource(Shards(path=shared_shards.folder, sequence_length=8).build(SourceContext()), 1)
    with pytest.raises(DataError, match="has slots 0 to 0"):
        source.fetch(0, [1])


@quick
@given(weights=st.lists(st.integers(1, 12), min_size=1, max_size=5))
def test_any_prefix_of_a_cycle_is_close_to_its_proportions_and_a_cycle_exact(weights: list[int]) -> None:
    size = sum(weights)
    chosen, counts = Cycle(weights).at(np.arange(3 * size))
    given_so_far = np.zeros(len(weights))
    for number, (source, count) in enumerate(zip(chosen.tolist(), counts.tolist(), strict=True)):
        assert count == given_so_far[source]  # each source's samples in its own order, none left out
        given_so_far[source] += 1
        exact = np.asarray(weights) * (number + 1) / size
        assert np.abs(given_so_far - exact).max() < max(1.0001, len(weights) / 2)
        if (number + 1) % size == 0:
            assert np.array_equal(given_so_far, exact)


def test_weights_become_the_smallest_whole_numbers() -> None:
    assert whole_weights([0.7, 0.3]) == (7, 3)
    assert whole_weights([2, 4, 2]) == (1, 2, 1)
    assert whole_weights([0.1, 0.2, 0.3, 0.4]) == (1, 2, 3, 4)
    rough = whole_weights([1 / 3, 2 / 3])
    assert abs(rough[0] / sum(rough) - 1 / 3) < 1e-4
    assert sum(whole_weights([3.14159265, 2.71828183])) == 2**16
    with pytest.raises(ValueError, match="positive"):
        whole_weights([1, 0])
    with pytest.raises(ValueError, match="below 1 in 65536"):
        whole_weights([1, 1e-9])


def mixed(make_shards: Make, weights: Sequence[float] = (3, 1), batch: int = 6, **kw: Any) -> MixSource:
    first, second = make_shards([200]), make_shards([120] * 2)
    none = {"fraction": 0.0}
    parts = [
        {"weight": weights[0], "source": tree(first, held_out=none, shuffle=False, **kw)},
        {"weight": weights[1], "source": tree(second, held_out=none, shuffle=False, **kw)},
    ]
    source = Mix.model_validate({"parts": parts}).build(SourceContext(0, "train", batch))
    assert isinstance(source, MixSource)
    return source


def test_a_mix_gives_each_source_its_share_and_its_order(make_shards: Make) -> None:
    source = mixed(make_shards)
    rows: list[list[int]] = []
    for step in range(4):
        rows += source.fetch(step, range(source.slots(step)))["tokens"].tolist()
    behind = [
        [row for step in range(3) for row in part.fetch(step, range(6))["tokens"].tolist()] for part in source.sources
    ]
    chosen, counts = source.cycle.at(np.arange(24))
    assert Counter(chosen.tolist()) == {0: 18, 1: 6}
    assert rows == [behind[source][count] for source, count in zip(chosen.tolist(), counts.tolist(), strict=True)]


def test_any_slot_of_a_mix_alone_equals_its_row_of_the_batch(make_shards: Make) -> None:
    source = mixed(make_shards, weights=(0.6, 0.4), batch=7, separate_documents=True)
    whole = source.fetch(5, range(7))
    for slot in (6, 0, 3):
        alone = source.fetch(5, [slot])
        assert all(torch.equal(alone[name][0], whole[name][slot]) for name in whole.fields)
    parts = source.fetch(5, [4, 1])
    assert torch.equal(parts["tokens"], whole["tokens"][[4, 1]])


def test_a_mix_ends_before_a_source_would_run_out(make_shards: Make) -> None:
    source = mixed(make_shards, weights=(1, 1), epochs=1)  # 25 and 30 rows
    steps = 0
    while slots := source.slots(steps):
        source.fetch(steps, range(slots))
        steps += 1
    assert steps == 25 * 2 // 6


def test_a_mix_of_different_tokenizers_is_refused(make_shards: Make) -> None:
    parts = [{"source": tree(make_shards([50], vocab_size=size), held_out={"fraction": 0.0})} for size in (900, 901)]
    with pytest.raises(DataError, match="different tokenizers"):
        Mix.model_validate({"parts": parts}).build(SourceContext())


def test_a_mix_refuses_to_resume_with_other_weights(make_shards: Make) -> None:
    state = mixed(make_shards).state_dict()
    mixed(make_shards).load_state_dict(state)
    with pytest.raises(DataError, match="another mix"):
        mixed(make_shards, weights=(1, 1)).load_state_dict(state)


def test_validation_of_a_mix_is_every_parts_validation(make_shards: Make) -> None:
    parts = [{"source": tree(make_shards([20] * n), held_out={"fraction": 0.5})} for n in (4, 10)]
    source: Any = Mix.model_validate({"parts": parts}).build(SourceContext(0, "validation", 4))
    alone = [
        Shards.model_validate({k: v for k, v in part["source"].items() if k != "use"}).build(
            SourceContext(0, "validation", 4)
        )
        for part in parts
    ]
    assert len(source) == sum(map(len, alone))
    batches = [part.fetch(step, range(part.slots(step))) for part in alone for step in range(len(part))]
    for step, expected in enumerate(batches):
        assert torch.equal(source.fetch(step, range(source.slots(step)))["tokens"], expected["tokens"])
    assert source.slots(len(source)) == 0
