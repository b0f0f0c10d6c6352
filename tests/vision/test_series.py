"""Series: windows of time, and what cannot be used."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from resilin.data.errors import DataError
from resilin.data.settings import SourceContext
from resilin.vision.grid import Grid
from resilin.vision.series import Series

TRAIN = SourceContext(0, "train", 4)


def test_windows_and_coarser_ones_of_the_same_span(tmp_path: Path) -> None:
    ramps = np.arange(32)[None] + 100 * np.arange(8)[:, None]
    np.savez(tmp_path / "s.npz", series=ramps, labels=np.arange(8) % 2)
    source = Series.model_validate({"path": tmp_path / "s.npz", "points": 16, "held_out": {"fraction": 0}}).build(TRAIN)
    batch = source.fetch(0, range(4))
    assert batch["inputs"].shape == (4, 1, 16)
    assert torch.equal(batch["inputs"].diff(dim=2), torch.ones(4, 1, 15))
    steps = {int(source.resampled(Grid(4)).fetch(s, [0])["inputs"][0, 0].diff()[0]) for s in range(60)}
    assert steps == {1, 2, 3, 4}


def test_bad_series_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", series=np.full((3, 8), np.nan), labels=np.zeros(3, int))
    np.savez(tmp_path / "b.npz", series=np.zeros(3), labels=np.zeros(3, int))
    for name, message in (("a", "series 0, channel 0, point 0 is not finite"), ("b", "expected numbers")):
        with pytest.raises(DataError, match=message):
            Series.model_validate({"path": tmp_path / f"{name}.npz", "points": 4}).build(TRAIN)
