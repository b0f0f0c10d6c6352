"""Samples by number: every sample of every split once, whatever the order of the steps, through mixes as well."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from resilin.data.errors import DataError
from resilin.data.mix import Mix
from resilin.data.packed import Shards
from resilin.data.pool import Pool, part_of, pool_of, pool_size
from resilin.data.settings import SourceContext
from resilin.data.shards import TokenShards

Make = Callable[..., TokenShards]
NONE_HELD = {"fraction": 0.0}


def source_of(shards: TokenShards, **kw: Any) -> Any:
    return Shards(path=shards.folder, **{"sequence_length": 5, "held_out": NONE_HELD, **kw}).build(
        SourceContext(3, "train", 4)
    )


def rows_of_an_epoch(source: Any) -> list[list[int]]:
    batches = [source.fetch(step, range(source.slots(step))) for step in range(len(source))]
    return sorted(row for batch in batches for row in batch["tokens"].tolist())


@pytest.mark.parametrize("more", [{}, {"unique_tokens": 20}, {"packing": "pad", "long_documents": "truncate"}])
def test_the_pool_holds_the_samples_of_an_epoch(make_shards: Make, more: dict[str, Any]) -> None:
    source = source_of(make_shards([7, 12, 3, 9, 20]), epochs=1, **more)
    assert isinstance(source, Pool)
    read = source.read(range(pool_size(source)))
    assert sorted(read["tokens"].tolist()) == rows_of_an_epoch(source)


def test_the_numbers_do_not_depend_on_the_seed_or_on_what_is_asked_beside(make_shards: Make) -> None:
    shards = make_shards([40, 50])
    one, other = (
        Shards(path=shards.folder, sequence_length=5, held_out=NONE_HELD).build(SourceContext(seed, "train", 4))
        for seed in (0, 1)
    )
    assert torch.equal(one.read([3, 9, 3])["labels"], other.read([3, 9, 3])["labels"])
    assert torch.equal(one.read([9])["tokens"][0], one.read([3, 9, 3])["tokens"][1])
    assert one.read([3, 9, 3]).slots_B.tolist() == [0, 1, 2]


def test_a_mix_lays_its_sources_end_to_end(make_shards: Make) -> None:
    first, second = make_shards([30]), make_shards([41])
    parts = [
        {"source": {"use": "resilin.data.packed:Shards", "path": str(s.folder), "sequence_length": 5,
                    "held_out": NONE_HELD}}
        for s in (first, second)
    ]  # fmt: skip
    mix = pool_of(Mix.model_validate({"parts": parts}).build(SourceContext(0, "train", 4)), "test")
    assert mix.pool_parts == (6, 8)
    alone = source_of(second)
    read = mix.read([7, 0, 13])
    assert torch.equal(read["tokens"][0], alone.read([1])["tokens"][0])
    assert torch.equal(read["tokens"][2], alone.read([7])["tokens"][0])
    assert torch.equal(read["tokens"][1], source_of(first).read([0])["tokens"][0])
    assert part_of(mix, torch.tensor([0, 5, 6, 13]).numpy()).tolist() == [0, 0, 1, 1]
    held = Mix.model_validate({"parts": parts}).model_copy()
    assert held.build(SourceContext(0, "train", 4)).pool_parts == (6, 8)  # type: ignore[attr-defined]


def test_numbers_outside_the_pool_are_refused(make_shards: Make) -> None:
    source = source_of(make_shards([30]))
    with pytest.raises(DataError, match="sample 6 is not in the pool, whose samples are 0 to 5"):
        source.read([0, 6])
    with pytest.raises(DataError, match="sample -1"):
        source.read([-1])


def test_a_source_that_cannot_be_read_by_number_says_so() -> None:
    class Stream:
        def slots(self, step: int) -> int:
            return 1

    with pytest.raises(DataError, match="Stream cannot give"):
        pool_of(Stream(), "selection")  # type: ignore[arg-type]
