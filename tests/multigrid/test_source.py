"""Multigrid batches: every sample once and in order, the shape of the step, the same for everyone who asks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from resilin.config import SettingsError
from resilin.data.prefetch import PrefetchSource
from resilin.data.settings import SourceContext
from resilin.multigrid.pieces import Pieces
from resilin.multigrid.source import Multigrid, MultigridSource
from resilin.vision.grid import Grid
from resilin.vision.images import Arrays

TRAIN = SourceContext(1, "train", 4)


@pytest.fixture
def numbered(tmp_path: Path) -> dict[str, Any]:
    """Images whose label is their number."""
    pixels = np.random.default_rng(0).integers(0, 256, (50, 8, 8)).astype(np.uint8)
    np.savez(tmp_path / "x.npz", images=pixels, labels=np.arange(50))
    return {
        "use": "resilin.vision.images:Arrays",
        "path": str(tmp_path / "x.npz"),
        "size": 8,
        "held_out": {"fraction": 0.0},
    }


def made(source: dict[str, Any], context: SourceContext = TRAIN, **more: Any) -> Any:
    tree = {"source": source, "epochs": 40, "stages": [20, 30], **more}
    return Multigrid.model_validate(tree).build(context)


def test_samples_come_in_the_order_of_the_source_each_once_an_epoch(numbered: dict[str, Any]) -> None:
    source, plain = made(numbered), Arrays.model_validate({k: v for k, v in numbered.items() if k != "use"})
    inner = plain.build(TRAIN)
    schedule = source.grid_schedule
    steps = schedule.total
    seen = torch.cat([source.fetch(step, range(source.slots(step)))["labels"] for step in range(steps)])
    wanted = torch.cat([inner.fetch(step, range(4))["labels"] for step in range(-(-len(seen) // 4))])[: len(seen)]
    assert torch.equal(seen, wanted)
    for epoch in range(len(seen) // 50):
        assert sorted(seen[50 * epoch : 50 * epoch + 50].tolist()) == list(range(50))
    assert len(seen) == pytest.approx(1.5 * 40 * 50, rel=0.03)
    assert source.slots(steps) == 0


def test_shapes_batches_and_phases_follow_the_schedule(numbered: dict[str, Any]) -> None:
    source = made(numbered)
    for step in (0, 1, 2, 3, source.grid_schedule.total - 1):
        phase = source.grid_schedule.phase(step)
        batch = source.fetch(step, range(source.slots(step)))
        assert batch["inputs"].shape == (4 * phase.multiplier, 1, phase.grid.size, phase.grid.size)
    assert [source.slots(step) for step in range(3)] == [16, 8, 8]
    assert [source.fetch(step, [0])["inputs"].shape[-1] for step in range(3)] == [4, 6, 6]


def test_a_slot_holds_the_same_whoever_asks(numbered: dict[str, Any]) -> None:
    source, again = made(numbered), made(numbered)
    whole = source.fetch(0, range(16))
    part = again.fetch(0, [9, 2, 14])
    assert part.slots_B.tolist() == [9, 2, 14]
    assert torch.equal(part["inputs"], whole["inputs"][[9, 2, 14]])
    assert torch.equal(part["labels"], whole["labels"][[9, 2, 14]])


def test_the_end_of_the_data_shortens_the_last_batch_and_loses_nothing(numbered: dict[str, Any]) -> None:
    source = made({**numbered, "epochs": 3})
    counts, step = [], 0
    while source.slots(step):
        counts.append(len(source.fetch(step, range(source.slots(step)))))
        step += 1
    assert sum(counts) == 150
    assert step < source.grid_schedule.total
    assert source.base_slots(step, 0) == 0
    assert source.base_slots(0, 0) == 8


def test_off_is_the_source_behind(numbered: dict[str, Any]) -> None:
    source = made(numbered, long_cycle=False, short_cycle=False)
    assert not isinstance(source, MultigridSource)
    assert not hasattr(source, "grid_schedule")


def test_validation_is_always_at_the_default_shape(numbered: dict[str, Any]) -> None:
    held = made({**numbered, "held_out": {"fraction": 0.0}}, SourceContext(1, "train", 4))
    assert held.fetch(held.grid_schedule.total - 1, [0])["inputs"].shape[-1] == 8
    pixels = np.zeros((20, 8, 8), np.uint8)
    path = Path(numbered["path"]).with_name("v.npz")
    np.savez(path, images=pixels, labels=np.arange(20) % 2)
    tree = {**numbered, "path": str(path), "held_out": {"fraction": 0.5}}
    validation = made(tree, SourceContext(1, "validation", 4))
    assert validation.fetch(0, range(4))["inputs"].shape == (4, 1, 8, 8)
    assert len(validation) == 3


def test_prefetching_follows_batches_that_change(numbered: dict[str, Any]) -> None:
    source, asked = made(numbered), []

    class Watched(MultigridSource):
        def fetch(self, step: int, slots: Any) -> Any:
            asked.append((step, len(slots)))
            return super().fetch(step, slots)

    watched = Watched(source.gridded, source.grid_schedule, 4)
    prefetch = PrefetchSource(watched, ahead=2)
    for step in range(6):
        mine, theirs = (s.fetch(step, range(source.slots(step))) for s in (prefetch, source))
        assert torch.equal(mine["inputs"], theirs["inputs"])
    prefetch._pool.shutdown()
    assert sorted(asked) == [(step, source.slots(step)) for step in range(8)], "nothing is fetched in vain"


class Rows:
    """Token rows that count up from 100 * sample."""

    vocab_size, sequence_length, epoch_length = 5000, 8, 40

    def slots(self, step: int) -> int:
        return 4

    def fetch(self, step: int, slots: Any) -> Any:
        from resilin.nouns import Batch

        starts = torch.tensor([100 * (4 * step + slot) for slot in slots])
        tokens = starts[:, None] + torch.arange(8)
        positions = torch.arange(8).expand(len(tokens), 8).clone()
        positions[:, 3:] -= 3
        documents = (torch.arange(8) >= 3).int().expand(len(tokens), 8).clone()
        fields = {"tokens": tokens, "labels": tokens + 1, "positions": positions, "documents": documents}
        return Batch(torch.tensor(list(slots)), fields)

    def state_dict(self) -> Any:
        return {}

    def load_state_dict(self, state: Any) -> None: ...


def test_rows_of_tokens_are_cut_into_windows() -> None:
    pieces = Pieces(Rows())
    assert pieces.grid == Grid(8)
    assert torch.equal(pieces.fetch(2, range(4))["tokens"], Rows().fetch(2, range(4))["tokens"])
    starts = set()
    for step in range(20):
        batch = pieces.resampled(Grid(4)).fetch(step, range(4))
        assert batch["tokens"].shape == (4, 4)
        assert torch.equal(batch["labels"], batch["tokens"] + 1)
        assert torch.equal(batch["tokens"].diff(dim=1), torch.ones(4, 3, dtype=torch.int64))
        assert (batch["positions"][:, 0] == 0).all(), "the window begins a text anew"
        assert (batch["documents"][:, 0] == 0).all()
        inside = batch["tokens"] % 100
        for row in range(4):
            second = inside[row] >= 3
            assert torch.equal(batch["documents"][row] == batch["documents"][row, -1], second | ~second.any())
        starts |= set(inside[:, 0].tolist())
    assert starts == {0, 1, 2, 3, 4}


def test_sources_of_one_shape_only_are_refused() -> None:
    from resilin.multigrid.source import as_gridded

    with pytest.raises(SettingsError, match="can be shown in one shape only"):
        as_gridded(object())  # type: ignore[arg-type]


def test_a_schedule_that_cannot_be_is_refused_when_settings_are_used(numbered: dict[str, Any]) -> None:
    with pytest.raises(SettingsError, match="source: stages"):
        made(numbered, stages=[30, 20])
