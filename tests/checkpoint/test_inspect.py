"""What a checkpoint says of itself."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from resilin.checkpoint.errors import CheckpointError
from resilin.checkpoint.folder import CheckpointFolder
from resilin.checkpoint.inspect import describe, find_checkpoint, list_checkpoints, verify

Make = Callable[[int], dict[str, Any]]


def test_a_description_lists_parts_tensors_ties_and_values(folder: CheckpointFolder, state: Make) -> None:
    saved = folder.save(5, state(5))
    found = describe(folder.path)
    assert (found.step, found.path) == (5, saved.path)
    assert abs(found.saved_at - time.time()) < 60
    assert [(p.name, p.tensors, p.numbers, p.bytes, p.values) for p in found.parts] == [
        ("model", 2, 90, 350, 0),
        ("optimizer", 2, 86, 344, 0),
        ("run", 0, 0, 0, 4),
    ]
    tied = found.tensors[0]
    assert (tied.name, tied.dtype, tied.shape, tied.bytes) == ("model/embed.weight", "F32", (17, 5), 340)
    assert tied.shared == ("model/head.weight",)
    assert found.values == {"run/step": 5, "run/best": "nan", "run/names/0": "a", "run/names/1": "b"}
    assert found.bytes < saved.bytes


def test_a_description_reads_no_tensor(folder: CheckpointFolder, state: Make) -> None:
    folder.save(5, state(5))
    file = folder.step_path(5) / "model.safetensors"
    file.write_bytes(b"\0" * file.stat().st_size)
    assert describe(folder.path).step == 5
    with pytest.raises(CheckpointError, match=r"model.safetensors"):
        verify(folder.path)


def test_odd_keys_are_described_by_their_names(folder: CheckpointFolder) -> None:
    folder.save(1, {"$a": {"x/y": 1, "$b": torch.ones(2)}, "": {}, "n": math.inf, "l": []})
    found = describe(folder.path)
    assert [part.name for part in found.parts] == ["$a", "", "n", "l"]
    assert found.values == {"$a/x~1y": 1, "": {}, "n": "inf", "l": []}
    assert found.tensors[0].name == "$a/$b"


def test_a_checkpoint_is_found_from_the_run_its_folder_or_itself(tmp_path: Path, state: Make) -> None:
    folder = CheckpointFolder(tmp_path / "run" / "checkpoints")
    for step in (1, 2, 3):
        folder.save(step, state(step))
    (folder.step_path(3) / "model.safetensors").unlink()
    two = folder.step_path(2)
    with pytest.warns(UserWarning, match="step 3 is passed over"):
        assert find_checkpoint(tmp_path / "run") == two
    with pytest.warns(UserWarning, match="step 3 is passed over"):
        assert find_checkpoint(folder.path) == two
    assert find_checkpoint(two) == two
    assert find_checkpoint(tmp_path / "run", step=1) == folder.step_path(1)
    with pytest.raises(CheckpointError, match=r"no checkpoint of step 3 that can be loaded; .*model.safetensors"):
        find_checkpoint(tmp_path / "run", step=3)
    with pytest.raises(CheckpointError, match=r"no checkpoint of step 9 .*steps here: 1, 2"):
        find_checkpoint(tmp_path / "run", step=9)
    with pytest.raises(CheckpointError, match=r"absent: no such folder"):
        find_checkpoint(tmp_path / "absent")
    with pytest.raises(CheckpointError, match=r"there is no checkpoint that can be loaded"):
        find_checkpoint(tmp_path)
    lines = list_checkpoints(tmp_path / "run")
    assert [(line.step, line.problem is None) for line in lines] == [(1, True), (2, True), (3, False)]
    assert "model.safetensors: the file is missing" in str(lines[2].problem)
    assert lines[0].bytes == sum(file.stat().st_size for file in folder.step_path(1).iterdir())
    folder.close()
